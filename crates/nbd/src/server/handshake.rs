//! Answers for what a server says until a client has chosen an export (fixed newstyle).

use super::{ALLOCATION, Offer, Session};
use crate::Broken;
use crate::limits::{
    MAX_INFOS, MAX_OPTION, MAX_OPTIONS, MAX_QUERIES, MAX_SKIP, MAX_STRING, MAX_WAITING,
};
use crate::wire::{Fields, GREETING, Mode, OPTION, OPTION_REPLY, can};

pub(crate) const NEWSTYLE: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 2;

/// Options.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const IS_ERROR: u32 = 1 << 31;
    pub(crate) const UNSUPPORTED: u32 = IS_ERROR | 1;
    pub(crate) const POLICY: u32 = IS_ERROR | 2;
    pub(crate) const INVALID: u32 = IS_ERROR | 3;
    pub(crate) const TLS_REQUIRED: u32 = IS_ERROR | 5;
    pub(crate) const UNKNOWN: u32 = IS_ERROR | 6;
    pub(crate) const TOO_BIG: u32 = IS_ERROR | 9;
    pub(crate) const EXTENDED_HEADERS_REQUIRED: u32 = IS_ERROR | 10;
}

/// Kinds of information about an export.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

pub(crate) const ALLOCATION_NAME: &[u8] = b"base:allocation";
const OPTION_HEAD: usize = 16;

/// How a handshake stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Open,
    /// The client has been told that TLS begins, once all is sent. What is not consumed of its
    /// bytes was sent too early: in plain text, by whoever can write to the network. It must not be
    /// used. [`Handshake::secured`] goes on inside.
    Secure,
    /// The client has chosen. What is not consumed of its bytes is its first requests.
    Chosen(Session),
    /// The client has left, or the connection has to end once all is sent.
    Closed,
}

/// Whether a server speaks TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// No.
    #[default]
    Off,
    /// To clients that want it.
    Offered,
    /// To all: nothing is said of the exports before.
    Required,
}

enum Step {
    ClientFlags,
    OptionHead,
    Option { option: u32, len: usize },
    Skip { option: u32, left: u32 },
}

/// A server's handshake with one client: bytes in, bytes out.
pub struct Handshake {
    offers: Vec<Offer>,
    step: Step,
    /// What has come of the step's bytes.
    input: Vec<u8>,
    output: Vec<u8>,
    outcome: Outcome,
    mode: Mode,
    no_zeroes: bool,
    options: u32,
    /// The name that `base:allocation` was chosen for.
    allocation: Option<Vec<u8>>,
    tls: Tls,
    is_secure: bool,
    /// What was refused because of TLS, in words that go on from "the client".
    refused: Option<&'static str>,
}

impl Handshake {
    /// Greets a client. `offers` is what it may choose from; the first has the empty name, too.
    #[must_use]
    pub fn new(offers: Vec<Offer>) -> Handshake {
        let mut output = Vec::with_capacity(256);
        output.extend(GREETING.to_be_bytes());
        output.extend(OPTION.to_be_bytes());
        output.extend((NEWSTYLE | NO_ZEROES).to_be_bytes());
        Handshake {
            offers,
            step: Step::ClientFlags,
            input: Vec::new(),
            output,
            outcome: Outcome::Open,
            mode: Mode::Simple,
            no_zeroes: false,
            options: 0,
            allocation: None,
            tls: Tls::Off,
            is_secure: false,
            refused: None,
        }
    }

    /// The same, of a server that speaks TLS.
    #[must_use]
    pub fn with_tls(mut self, tls: Tls) -> Handshake {
        self.tls = tls;
        self
    }

    /// TLS has begun: what the client says from now on is said inside. What it has said before is
    /// forgotten, as anybody may have said it.
    ///
    /// # Panics
    /// If that was not agreed on.
    pub fn secured(&mut self) {
        assert!(self.outcome == Outcome::Secure && self.output.is_empty(), "nobody asked for TLS");
        self.outcome = Outcome::Open;
        self.is_secure = true;
        self.refused = None;
        self.mode = Mode::Simple;
        self.allocation = None;
    }

    /// What was refused because of TLS, in words that go on from "the client": why it has left.
    #[must_use]
    pub fn refused(&self) -> Option<&'static str> {
        self.refused
    }

    /// How it stands. A connection is closed only when [`Handshake::output`] is sent.
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

    /// Takes what a client has sent; how much of it was taken. Less than all where it has chosen,
    /// or has to take what was said before.
    ///
    /// # Errors
    /// If that is no NBD.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let mut taken = 0;
        while self.outcome == Outcome::Open
            && self.output.len() < MAX_WAITING
            && taken < bytes.len()
        {
            taken += self.advance(&bytes[taken..])?;
        }
        Ok(taken)
    }

    /// Takes some bytes of the step that it is in; goes to the next when it has all of them.
    fn advance(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        if let Step::Skip { option, left } = self.step {
            let count = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let left = left - u32::try_from(count).unwrap_or(left);
            self.step = Step::Skip { option, left };
            if left == 0 {
                self.step = Step::OptionHead;
                self.answer(option, reply::TOO_BIG, &[]);
            }
            return Ok(count);
        }
        let wanted = match self.step {
            Step::ClientFlags => 4,
            Step::OptionHead => OPTION_HEAD,
            Step::Option { len, .. } => len,
            Step::Skip { .. } => 0,
        };
        let count = bytes.len().min(wanted - self.input.len());
        self.input.extend(&bytes[..count]);
        if self.input.len() == wanted {
            let input = std::mem::take(&mut self.input);
            self.complete(&input)?;
        }
        Ok(count)
    }

    /// All bytes of a step are there.
    fn complete(&mut self, input: &[u8]) -> Result<(), Broken> {
        match self.step {
            Step::ClientFlags => {
                let flags = Fields(input).u32().unwrap_or(0);
                let known = u32::from(NEWSTYLE | NO_ZEROES);
                if flags & !known != 0 {
                    return Err(Broken("flags that no client has"));
                }
                self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
                self.step = Step::OptionHead;
            }
            Step::OptionHead => return self.begin_option(input),
            Step::Option { option, .. } => {
                self.step = Step::OptionHead;
                self.option(option, input);
            }
            Step::Skip { .. } => {}
        }
        Ok(())
    }

    fn begin_option(&mut self, input: &[u8]) -> Result<(), Broken> {
        let mut fields = Fields(input);
        let magic = fields.u64();
        let (Some(option), Some(len)) = (fields.u32(), fields.u32()) else { return Ok(()) };
        if magic != Some(OPTION) {
            return Err(Broken("no option where one should begin"));
        }
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(Broken("too many options"));
        }
        self.step = match usize::try_from(len) {
            Ok(0) => {
                self.step = Step::OptionHead;
                self.option(option, &[]);
                return Ok(());
            }
            Ok(kept) if kept <= MAX_OPTION => Step::Option { option, len: kept },
            // There is no way to refuse an EXPORT_NAME but to go.
            _ if len > MAX_SKIP || option == option::EXPORT_NAME => {
                return Err(Broken("an option longer than any"));
            }
            _ => Step::Skip { option, left: len },
        };
        Ok(())
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.output.extend(OPTION_REPLY.to_be_bytes());
        for number in [option, kind, len] {
            self.output.extend(number.to_be_bytes());
        }
        self.output.extend(data);
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let is_open = self.tls != Tls::Required || self.is_secure;
        if !is_open && !matches!(option, option::STARTTLS | option::ABORT) {
            self.refused = Some("wants no TLS, which is required");
            if option == option::EXPORT_NAME {
                // It has no way to be refused.
                self.outcome = Outcome::Closed;
                return;
            }
            return self.answer(option, reply::TLS_REQUIRED, b"this server wants TLS");
        }
        if option == option::STARTTLS {
            return self.start_tls(data);
        }
        let kind = match option {
            option::EXPORT_NAME => return self.export_name(data),
            option::ABORT => {
                self.outcome = Outcome::Closed;
                reply::ACK
            }
            option::LIST if data.is_empty() => self.list(),
            option::INFO | option::GO => self.info(option, data),
            // Once headers are extended, there is no way back.
            option::STRUCTURED_REPLY if self.mode == Mode::Extended => {
                reply::EXTENDED_HEADERS_REQUIRED
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.mode = Mode::Structured;
                reply::ACK
            }
            option::EXTENDED_HEADERS if data.is_empty() => {
                self.mode = Mode::Extended;
                reply::ACK
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data),
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => reply::INVALID,
            _ => reply::UNSUPPORTED,
        };
        self.answer(option, kind, &[]);
    }

    fn start_tls(&mut self, data: &[u8]) {
        let (kind, text) = match self.tls {
            _ if !data.is_empty() => (reply::INVALID, "STARTTLS has no data"),
            _ if self.is_secure => (reply::INVALID, "TLS has begun already"),
            Tls::Off => {
                self.refused = Some("wants TLS, which is not spoken here");
                (reply::POLICY, "this server speaks no TLS")
            }
            Tls::Offered | Tls::Required => {
                self.outcome = Outcome::Secure;
                (reply::ACK, "")
            }
        };
        self.answer(option::STARTTLS, kind, text.as_bytes());
    }

    fn find(&self, name: &[u8]) -> Option<&Offer> {
        match name {
            [] => self.offers.first(),
            _ => self.offers.iter().find(|offer| offer.name.as_bytes() == name),
        }
    }

    /// What an export can do for this client: where there are chunks, a reply is always one.
    fn flags(&self, offer: &Offer) -> u16 {
        if self.mode == Mode::Simple { offer.flags } else { offer.flags | can::DF }
    }

    fn choose(&mut self, offer: &Offer, name: &[u8]) {
        let allocation =
            self.mode != Mode::Simple && self.allocation.as_deref().is_some_and(|of| of == name);
        let (size, flags, block) = (offer.size, self.flags(offer), offer.block);
        self.outcome = Outcome::Chosen(Session { mode: self.mode, flags, size, block, allocation });
    }

    /// The old way to choose, without a way to refuse.
    fn export_name(&mut self, name: &[u8]) {
        let Some(offer) = self.find(name).cloned() else {
            self.outcome = Outcome::Closed;
            return;
        };
        self.output.extend(offer.size.to_be_bytes());
        self.output.extend(self.flags(&offer).to_be_bytes());
        if !self.no_zeroes {
            self.output.extend([0; 124]);
        }
        self.choose(&offer, name);
    }

    fn list(&mut self) -> u32 {
        for offer in self.offers.clone() {
            let mut data = Vec::with_capacity(64);
            put_string(&mut data, offer.name.as_bytes());
            data.extend(offer.description.as_bytes());
            self.answer(option::LIST, reply::SERVER, &data);
        }
        reply::ACK
    }

    fn info(&mut self, option: u32, data: &[u8]) -> u32 {
        let mut fields = Fields(data);
        let Some(name) = fields.string(MAX_STRING).map(<[u8]>::to_vec) else {
            return reply::INVALID;
        };
        let Some(count) = fields.u16().filter(|count| *count <= MAX_INFOS) else {
            return reply::INVALID;
        };
        let asked: Vec<u16> = (0..count).map_while(|_| fields.u16()).collect();
        if asked.len() != usize::from(count) || !fields.0.is_empty() {
            return reply::INVALID;
        }
        let Some(offer) = self.find(&name).cloned() else { return reply::UNKNOWN };
        let flags = self.flags(&offer);
        let mut tell = |kind: u16, data: &[u8]| {
            let mut all = kind.to_be_bytes().to_vec();
            all.extend(data);
            self.answer(option, reply::INFO, &all);
        };
        let mut size = offer.size.to_be_bytes().to_vec();
        size.extend(flags.to_be_bytes());
        tell(info::EXPORT, &size);
        if asked.contains(&info::NAME) {
            tell(info::NAME, offer.name.as_bytes());
        }
        if asked.contains(&info::DESCRIPTION) {
            tell(info::DESCRIPTION, offer.description.as_bytes());
        }
        // Asked for or not: who does not look at it cannot know the blocks.
        let sizes = [offer.block, offer.preferred, crate::limits::MAX_PAYLOAD];
        tell(info::BLOCK_SIZE, &sizes.map(u32::to_be_bytes).concat());
        if option == option::GO {
            self.choose(&offer, &name);
        }
        reply::ACK
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> u32 {
        let is_set = option == option::SET_META_CONTEXT;
        if is_set {
            // Whatever becomes of it, what was chosen before is not any more.
            self.allocation = None;
            if self.mode == Mode::Simple {
                return reply::INVALID;
            }
        }
        let mut fields = Fields(data);
        let Some(name) = fields.string(MAX_STRING).map(<[u8]>::to_vec) else {
            return reply::INVALID;
        };
        let Some(count) = fields.u32() else { return reply::INVALID };
        if count > MAX_QUERIES {
            return reply::TOO_BIG;
        }
        let mut is_asked = count == 0 && !is_set;
        for _ in 0..count {
            let Some(query) = fields.string(MAX_STRING) else { return reply::INVALID };
            is_asked |= query == ALLOCATION_NAME || (query == b"base:" && !is_set);
        }
        if !fields.0.is_empty() {
            return reply::INVALID;
        }
        if self.find(&name).is_none() {
            return reply::UNKNOWN;
        }
        if is_asked {
            let id = if is_set { ALLOCATION } else { 0 };
            let mut data = id.to_be_bytes().to_vec();
            data.extend(ALLOCATION_NAME);
            self.answer(option, reply::META_CONTEXT, &data);
        }
        self.allocation = (is_asked && is_set).then_some(name).or(self.allocation.take());
        reply::ACK
    }
}

pub(crate) fn put_string(to: &mut Vec<u8>, text: &[u8]) {
    to.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    to.extend(text);
}
