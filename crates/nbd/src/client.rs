//! Answers for what a client says until a server has given it an export (fixed newstyle), with as
//! much of the protocol as the server speaks. What it asks then is in [`asks`], and what becomes of
//! that when a connection is lost in [`conversation`].

pub mod asks;
pub mod conversation;
mod filled;

pub use asks::{Asks, Extent, Said};
pub use conversation::{Conversation, Patience};

use crate::Broken;
use crate::limits::{MAX_OPTION, MAX_PAYLOAD, MAX_REPLIES};
use crate::server::handshake::{
    ALLOCATION_NAME, NEWSTYLE, NO_ZEROES, info, option, put_string, reply,
};
use crate::wire::{Fields, GREETING, Mode, OPTION, OPTION_REPLY, can};

/// What a client wants.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The export; empty for the default one.
    pub name: String,
    /// The best mode to ask for.
    pub mode: Mode,
    /// Whether to ask for `base:allocation`.
    pub allocation: bool,
    /// Whether to say nothing but inside TLS, and to go where there is none.
    pub tls: bool,
}

/// What it has got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// How requests and replies look.
    pub mode: Mode,
    /// Of [`can`].
    pub flags: u16,
    /// Bytes of the device.
    pub size: u64,
    /// Requests are multiples of this, a power of two.
    pub block: u32,
    /// Requests are best multiples of this.
    pub preferred: u32,
    /// Bytes of data that a request may have.
    pub most: u32,
    /// The number of `base:allocation` in replies, where it may be asked for.
    pub allocation: Option<u32>,
}

/// How a handshake stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Open,
    /// The server has said that TLS begins. What is not consumed of its bytes was sent too early,
    /// by whoever can write to the network, and must not be used. [`Handshake::secured`] goes on
    /// inside.
    Secure,
    /// The export is there.
    Chosen(Agreed),
    /// The server does not give it; says why.
    Refused(String),
}

enum Step {
    Greeting,
    ReplyHead,
    Reply {
        kind: u32,
        len: usize,
    },
    /// What the old way to choose brings.
    Export,
}

/// A client's handshake: bytes in, bytes out.
pub struct Handshake {
    wish: Wish,
    step: Step,
    input: Vec<u8>,
    output: Vec<u8>,
    outcome: Outcome,
    agreed: Agreed,
    /// The option that waits for its reply.
    asked: u32,
    replies: u32,
    has_size: bool,
    no_zeroes: bool,
    newstyle: bool,
}

const GREETING_LEN: usize = 18;
const REPLY_HEAD: usize = 20;

impl Handshake {
    /// The beginning: the server speaks first.
    #[must_use]
    pub fn new(wish: Wish) -> Handshake {
        let agreed = Agreed {
            mode: Mode::Simple,
            flags: 0,
            size: 0,
            block: 1,
            preferred: 4096,
            most: MAX_PAYLOAD,
            allocation: None,
        };
        Handshake {
            wish,
            step: Step::Greeting,
            input: Vec::new(),
            output: Vec::new(),
            outcome: Outcome::Open,
            agreed,
            asked: 0,
            replies: 0,
            has_size: false,
            no_zeroes: false,
            newstyle: false,
        }
    }

    /// TLS has begun: what is said from now on is said inside.
    ///
    /// # Panics
    /// If that was not agreed on.
    pub fn secured(&mut self) {
        assert!(self.outcome == Outcome::Secure, "TLS was not agreed on");
        self.outcome = Outcome::Open;
        self.begin();
    }

    /// How it stands.
    #[must_use]
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// What is to be sent.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// So much of it was sent.
    ///
    /// # Panics
    /// If that is more than there was.
    pub fn sent(&mut self, count: usize) {
        self.output.drain(..count);
    }

    /// Takes what the server has sent; how much of it was taken, all unless the end is reached.
    ///
    /// # Errors
    /// If that is no NBD.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let mut taken = 0;
        while self.outcome == Outcome::Open && taken < bytes.len() {
            let wanted = match self.step {
                Step::Greeting => GREETING_LEN,
                Step::ReplyHead => REPLY_HEAD,
                Step::Reply { len, .. } => len,
                Step::Export if self.no_zeroes => 10,
                Step::Export => 134,
            };
            let count = (bytes.len() - taken).min(wanted - self.input.len());
            self.input.extend(&bytes[taken..taken + count]);
            taken += count;
            if self.input.len() == wanted {
                let input = std::mem::take(&mut self.input);
                self.complete(&input)?;
            }
        }
        Ok(taken)
    }

    /// All bytes of a step are there.
    fn complete(&mut self, input: &[u8]) -> Result<(), Broken> {
        let mut fields = Fields(input);
        match self.step {
            Step::Greeting => self.greeted(&mut fields),
            Step::ReplyHead => {
                if fields.u64() != Some(OPTION_REPLY) || fields.u32() != Some(self.asked) {
                    return Err(Broken("no reply to what was asked"));
                }
                self.replies += 1;
                let (kind, len) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(u32::MAX));
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                if len > MAX_OPTION || self.replies > MAX_REPLIES {
                    return Err(Broken("a reply longer than any"));
                }
                self.step = Step::Reply { kind, len };
                if len == 0 { self.replied(kind, &[]) } else { Ok(()) }
            }
            Step::Reply { kind, .. } => self.replied(kind, input),
            Step::Export => {
                self.agreed.size = fields.u64().unwrap_or(0);
                self.agreed.flags = fields.u16().unwrap_or(0);
                self.has_size = true;
                self.chosen()
            }
        }
    }

    fn greeted(&mut self, fields: &mut Fields<'_>) -> Result<(), Broken> {
        if fields.u64() != Some(GREETING) || fields.u64() != Some(OPTION) {
            return Err(Broken("no greeting of a newstyle server"));
        }
        let flags = fields.u16().unwrap_or(0);
        let newstyle = flags & NEWSTYLE;
        self.no_zeroes = flags & NO_ZEROES != 0;
        let ours = newstyle | (flags & NO_ZEROES);
        self.output.extend(u32::from(ours).to_be_bytes());
        self.newstyle = newstyle != 0;
        match (self.wish.tls, self.newstyle) {
            (false, _) => self.begin(),
            (true, true) => self.ask(option::STARTTLS, &[]),
            (true, false) => {
                let reason = "the server speaks no TLS: it is too old for that";
                self.outcome = Outcome::Refused(reason.to_owned());
            }
        }
        Ok(())
    }

    /// The first question about exports.
    fn begin(&mut self) {
        match (self.newstyle, self.wish.mode) {
            (false, _) => self.export_name(),
            (true, Mode::Extended) => self.ask(option::EXTENDED_HEADERS, &[]),
            (true, Mode::Structured) => self.ask(option::STRUCTURED_REPLY, &[]),
            (true, Mode::Simple) => self.go(),
        }
    }

    fn ask(&mut self, option: u32, data: &[u8]) {
        self.output.extend(OPTION.to_be_bytes());
        self.output.extend(option.to_be_bytes());
        put_string(&mut self.output, data);
        self.asked = option;
        self.replies = 0;
        self.step = Step::ReplyHead;
    }

    fn export_name(&mut self) {
        let name = self.wish.name.clone();
        self.ask(option::EXPORT_NAME, name.as_bytes());
        self.step = Step::Export;
    }

    fn go(&mut self) {
        let mut data = Vec::new();
        put_string(&mut data, self.wish.name.as_bytes());
        data.extend(1_u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.ask(option::GO, &data);
    }

    fn contexts(&mut self) {
        if !self.wish.allocation || self.agreed.mode == Mode::Simple {
            return self.go();
        }
        let mut data = Vec::new();
        put_string(&mut data, self.wish.name.as_bytes());
        data.extend(1_u32.to_be_bytes());
        put_string(&mut data, ALLOCATION_NAME);
        self.ask(option::SET_META_CONTEXT, &data);
    }

    /// A reply to the option that was asked.
    fn replied(&mut self, kind: u32, data: &[u8]) -> Result<(), Broken> {
        self.step = Step::ReplyHead;
        let is_error = kind & reply::IS_ERROR != 0;
        match (self.asked, kind) {
            // Without a way back: a server that speaks none, or somebody in between.
            (option::STARTTLS, reply::ACK) if data.is_empty() => self.outcome = Outcome::Secure,
            (option::STARTTLS, _) if is_error => {
                let reason = format!("the server speaks no TLS ({})", refusal(kind, data));
                self.outcome = Outcome::Refused(reason);
            }
            // It will say so to whatever is asked next.
            (_, reply::TLS_REQUIRED) => self.outcome = Outcome::Refused(refusal(kind, data)),
            (option::EXTENDED_HEADERS, reply::ACK) => {
                self.agreed.mode = Mode::Extended;
                self.contexts();
            }
            (option::EXTENDED_HEADERS, _) if is_error => self.ask(option::STRUCTURED_REPLY, &[]),
            (option::STRUCTURED_REPLY, reply::ACK) => {
                self.agreed.mode = Mode::Structured;
                self.contexts();
            }
            (option::STRUCTURED_REPLY, _) if is_error => self.go(),
            (option::SET_META_CONTEXT, reply::META_CONTEXT) => {
                let mut fields = Fields(data);
                let id = fields.u32();
                if fields.0 == ALLOCATION_NAME {
                    self.agreed.allocation = id;
                }
            }
            (option::SET_META_CONTEXT, reply::ACK) => self.go(),
            (option::SET_META_CONTEXT, _) if is_error => {
                self.agreed.allocation = None;
                self.go();
            }
            (option::GO, reply::INFO) => return self.informed(data),
            (option::GO, reply::ACK) => return self.chosen(),
            (option::GO, reply::UNSUPPORTED) => self.export_name(),
            (option::GO, _) if is_error => {
                self.outcome = Outcome::Refused(refusal(kind, data));
            }
            _ => return Err(Broken("a reply that does not belong to what was asked")),
        }
        Ok(())
    }

    fn informed(&mut self, data: &[u8]) -> Result<(), Broken> {
        let mut fields = Fields(data);
        let broken = Broken("information that is too short");
        match fields.u16().ok_or(broken)? {
            info::EXPORT => {
                self.agreed.size = fields.u64().ok_or(broken)?;
                self.agreed.flags = fields.u16().ok_or(broken)?;
                self.has_size = true;
            }
            info::BLOCK_SIZE => {
                let block = fields.u32().ok_or(broken)?;
                let (best, most) = (fields.u32().ok_or(broken)?, fields.u32().ok_or(broken)?);
                if !block.is_power_of_two() || block > 64 << 10 || most < block || best < block {
                    return Err(Broken("block sizes that make no sense"));
                }
                self.agreed.block = block;
                self.agreed.preferred = best;
                self.agreed.most = most.min(MAX_PAYLOAD) & !(block - 1);
            }
            _ => {}
        }
        Ok(())
    }

    fn chosen(&mut self) -> Result<(), Broken> {
        if !self.has_size || self.agreed.flags & can::HAS_FLAGS == 0 {
            return Err(Broken("an export without a size and flags"));
        }
        if self.agreed.size > i64::MAX as u64 {
            return Err(Broken("an export larger than any"));
        }
        self.outcome = Outcome::Chosen(self.agreed.clone());
        Ok(())
    }
}

/// What an error reply says, in words.
fn refusal(kind: u32, data: &[u8]) -> String {
    let what = match kind & !reply::IS_ERROR {
        2 => "not allowed by the server",
        3 => "the server calls the request invalid",
        4 => "the server's machine cannot do it",
        5 => "the server wants TLS",
        6 => "the server has no such export",
        7 => "the server is shutting down",
        8 => "the server wants another block size",
        _ => "the server refuses",
    };
    // It is shown to people: nothing that would move their cursor.
    let text: String = String::from_utf8_lossy(data).chars().filter(|c| !c.is_control()).collect();
    if text.is_empty() { what.to_owned() } else { format!("{what}: {text}") }
}
