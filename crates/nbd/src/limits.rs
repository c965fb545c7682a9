//! Answers for the bounds of everything that a peer can make longer.

/// Bytes of data that a request may carry or ask for; what the protocol document has clients assume
/// where a server says nothing.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Bytes of an export's name, or of a query; the protocol's own limit for strings.
pub const MAX_STRING: usize = 4096;
/// Bytes of an option's data that are kept.
pub const MAX_OPTION: usize = 32 << 10;
/// Bytes of an option's data that are skipped for the sake of a polite refusal.
pub const MAX_SKIP: u32 = 1 << 20;
/// Options that a client may send before it chooses an export.
pub const MAX_OPTIONS: u32 = 256;
/// Queries of one option.
pub const MAX_QUERIES: u32 = 64;
/// Kinds of information that a client may ask for in one option.
pub const MAX_INFOS: u16 = 64;
/// Bytes that wait to be sent to a client during the handshake; nothing more is read from it until
/// they are fewer.
pub const MAX_WAITING: usize = 64 << 10;
/// Replies to one option that a client takes.
pub const MAX_REPLIES: u32 = 1024;
/// Extents in the reply to one question about a range.
pub const MAX_EXTENTS: usize = 256;
/// Bytes of a reply, data left out, that a client keeps: extents, or the text of an error.
pub const MAX_REPLY: usize = 16 << 10;
/// Seconds that a handshake may take, on either side.
pub const HANDSHAKE_SECONDS: u64 = 10;
