"""What each layer keeps of a picture: watched in one answer (`trace`), drawn as a PNG (`png`) or as
a page that needs no network (`page`)."""
