//! Answers for the stack language.
