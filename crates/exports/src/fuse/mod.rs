//! Answers for the FUSE front end.
