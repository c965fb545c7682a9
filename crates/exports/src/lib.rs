//! Answers for front ends: how block requests of this machine reach the engine.

pub mod disk;
pub mod extents;
pub mod fuse;
pub mod host;
pub mod local;
pub mod nbd;
pub mod pool;
pub mod threads;
pub mod ublk;
