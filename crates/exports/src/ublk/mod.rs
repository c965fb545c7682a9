//! Answers for the ublk front end.
