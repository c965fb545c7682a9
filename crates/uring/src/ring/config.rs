//! Answers for how large a ring's tables are, and what memory its requests have.

/// What memory a lane's requests have.
#[derive(Clone, Copy, Debug)]
pub struct LaneMemory {
    /// Tags of the lane.
    pub depth: u16,
    /// Bytes of data per tag in memory of ours; 0 for none at all.
    pub bytes: u32,
    /// Whether each tag also gets a slot for the device's own pages.
    pub slots: bool,
    /// Whether the memory is made resident and locked: the kernel copies into it on its own (ublk's
    /// copy mode loses the tail of a write whose memory it cannot fault in).
    pub locked: bool,
}

/// How large a ring's tables are.
#[derive(Clone, Debug)]
pub struct Config {
    /// Splices in flight: keys are below it.
    pub flights: u32,
    /// Files that will be added, the built-in one for zeros not counted.
    pub files: u16,
    /// One per lane.
    pub lanes: Vec<LaneMemory>,
    /// Lanes behind those for requests that layers make themselves.
    pub inner: u16,
}
