//! Answers for the command line of what only a ublk disk can be asked for, beside queues and data
//! paths.

use clap::Args;
use serde::{Deserialize, Serialize};

#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
pub struct Ublk {
    /// Make it as a user without CAP_SYS_ADMIN, whom udev gives the nodes (Linux 6.3): the kernel
    /// copies, and the disk goes with its server. docs/ublk.md says more.
    #[arg(long)]
    #[serde(default)]
    pub unprivileged: bool,
    /// A file of memory that clients map as well, on hugetlbfs for example: the driver marks the
    /// direct I/O that is from and to it (Linux 7.1).
    #[arg(long, value_name = "FILE")]
    #[serde(default)]
    pub shared_memory: Option<String>,
}

impl Ublk {
    /// The first option that is given.
    pub fn first(&self) -> Option<&'static str> {
        let Ublk { unprivileged, shared_memory } = self;
        let all = [("--unprivileged", *unprivileged), ("--shared-memory", shared_memory.is_some())];
        all.into_iter().find(|(_, is_given)| *is_given).map(|(name, _)| name)
    }
}
