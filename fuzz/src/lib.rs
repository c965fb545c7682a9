//! Answers for what every parser promises about any bytes: no panic, no overflow, and what is
//! accepted means what it says. One entry function a parser.
//!
//! Run by cargo-fuzz (`fuzz_targets`), and over the seeds and what chance makes of them in
//! crates/contract/tests/parsers.rs.
#![forbid(unsafe_code)]

use devsplice_core::prelude::*;
use devsplice_core::size::{parse_duration_ns, parse_size, show_size};
use devsplice_exports::fuse::node::{Answer, MAX_WRITE, Node};
use devsplice_exports::fuse::wire;
use devsplice_nbd::client::{self, Asks, Said, Wish};
use devsplice_nbd::limits::{MAX_OPTION, MAX_PAYLOAD, MAX_WAITING};
use devsplice_nbd::server::{Ask, Handshake, Offer, Outcome, Refusal, Session, Tls};
use devsplice_nbd::uri::Uri;
use devsplice_nbd::wire::{Reply, can, command};
use devsplice_nbd::{Mode, Request};
use devsplice_spec::{Catalog, Plan};

const CATALOG: Catalog =
    Catalog { layers: devsplice_layers::DRIVERS, sources: devsplice_backends::SOURCES };
/// Bytes of the devices that drivers are opened over.
const DISK: u64 = 1 << 20;

/// A stack as an expression: what parses reads back as the same plan.
pub fn stack_line(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(plan) = Plan::parse(text, &CATALOG) {
        reads_back(&plan);
    }
}

/// A stack as a TOML document.
pub fn stack_toml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(plan) = Plan::parse_toml(text, &CATALOG) {
        reads_back(&plan);
    }
}

fn reads_back(plan: &Plan) {
    let line = plan.to_expression();
    match Plan::parse(&line, &CATALOG) {
        Ok(again) => assert_eq!(again.to_expression(), line, "it reads back as another plan"),
        Err(error) => panic!("{line}\nwas written by us and is refused: {error}"),
    }
    assert!(plan.root < plan.places.len(), "the root is no place");
}

/// Sizes and durations: what is shown reads back, and agrees with arithmetic in 128 bits.
pub fn numbers(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = parse_duration_ns(text);
    let _ = Errno::parse(text);
    if let Ok(size) = parse_size(text) {
        assert_eq!(parse_size(&show_size(size)), Ok(size), "{text}");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        if let (Ok(number), true) = (digits.parse::<u128>(), !text.starts_with("0x")) {
            assert!(number <= u128::from(size), "{text} became {size}");
        }
    }
}

/// `driver key=value ...`: a driver that takes its keys opens or refuses, and one that opens
/// answers for the first and the last block of its device without leaving what lies below.
pub fn driver_keys(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut words = text.split_whitespace();
    let Some(driver) = words.next().and_then(devsplice_layers::find) else { return };
    let pairs = words.filter_map(|word| word.split_once('='));
    let given: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let count = match driver.below {
        Arity::None => 0,
        Arity::One => 1,
        Arity::Many => 1 + text.len() % 4,
    };
    let made = Args::new(driver.name, driver.keys, &given).and_then(|args| (driver.make)(&args));
    if let Ok(layer) = made {
        opens(driver.name, layer, &vec![Limits::ideal(DISK); count], &[]);
    }
}

/// A disk that begins with these bytes: every partition that is found lies inside it.
pub fn mbr(bytes: &[u8]) {
    let mut image = bytes.to_vec();
    image.resize(image.len().max(512), 0);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    partitions(&image);
}

/// A GUID partition table with these bytes as header and entries; its marks and checksums are made
/// to fit, since nothing would be looked at otherwise.
pub fn gpt(bytes: &[u8]) {
    let mut image = vec![0; 34 * 512];
    // The protective entry, in the first sector.
    image[446 + 4] = 0xee;
    image[446 + 8] = 1;
    image[446 + 12..446 + 16].copy_from_slice(&u32::MAX.to_le_bytes());
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    let (head, rest) = bytes.split_at(bytes.len().min(92));
    image[512..512 + head.len()].copy_from_slice(head);
    let count = rest.len().min(32 * 512);
    image[1024..1024 + count].copy_from_slice(&rest[..count]);
    // Signature, revision 1.0, header size 92; it lies in block 1.
    image[512..520].copy_from_slice(b"EFI PART");
    image[520..524].copy_from_slice(&0x0001_0000_u32.to_le_bytes());
    image[524..528].copy_from_slice(&92_u32.to_le_bytes());
    image[536..544].copy_from_slice(&1_u64.to_le_bytes());
    // Most of the time, the entries are where they are, and as many as fit.
    if !head.first().is_some_and(|byte| byte.is_multiple_of(8)) {
        image[584..592].copy_from_slice(&2_u64.to_le_bytes());
        image[592..596].copy_from_slice(&128_u32.to_le_bytes());
        image[596..600].copy_from_slice(&128_u32.to_le_bytes());
    }
    let entries = crc32(&image[1024..1024 + 128 * 128]);
    image[600..604].copy_from_slice(&entries.to_le_bytes());
    image[528..532].fill(0);
    let header = crc32(&image[512..604]);
    image[528..532].copy_from_slice(&header.to_le_bytes());
    partitions(&image);
}

/// As GPT checks: the polynomial 0xedb88320, from the lowest bit.
fn crc32(bytes: &[u8]) -> u32 {
    let byte = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xedb8_8320 }
        })
    };
    !bytes.iter().fold(u32::MAX, byte)
}

fn partitions(image: &[u8]) {
    let driver = &devsplice_layers::partition::DRIVER;
    for number in ["1", "2", "5", "6", "128"] {
        let given = [("number".to_owned(), number.to_owned())];
        let made =
            Args::new(driver.name, driver.keys, &given).and_then(|args| (driver.make)(&args));
        let layer = made.unwrap_or_else(|error| panic!("a plain number is refused: {error}"));
        let limits =
            Limits { size: DISK.max(image.len() as u64 / 512 * 512), ..Limits::ideal(DISK) };
        opens(driver.name, layer, &[limits], image);
    }
}

/// Devices that begin with the same bytes.
struct Disks<'a> {
    limits: &'a [Limits],
    bytes: &'a [u8],
}

impl Lower for Disks<'_> {
    fn limits(&self) -> &[Limits] {
        self.limits
    }

    fn read(&mut self, port: Port, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let limits = self.limits.get(usize::from(port.0)).ok_or(Errno::EINVAL)?;
        let extent = Extent { at, len: into.len() as u64 };
        if extent.len == 0 || !extent.within(limits.size) || (at | extent.len) & 511 != 0 {
            return Err(Errno::EINVAL);
        }
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(self.bytes.len());
        let have = into.len().min(self.bytes.len() - from);
        into.fill(0);
        into[..have].copy_from_slice(&self.bytes[from..from + have]);
        Ok(())
    }
}

/// Opens a layer; what it answers for the ends of its device lies inside those below.
fn opens(name: &str, mut layer: Box<dyn Layer>, below: &[Limits], bytes: &[u8]) {
    let opened = layer.open(&mut Disks { limits: below, bytes }).and_then(Limits::checked);
    let Ok(limits) = opened else { return };
    let block = u64::from(limits.block);
    for at in [0, (limits.size / 2) & !(block - 1), limits.size - block] {
        for op in [Op::Read, Op::Write, Op::Discard] {
            let io = Io::new(op, at, block.min(limits.size - at));
            let (port, place, len) = match layer.map(io) {
                Ok(Map::To { len, port, at } | Map::After { len, port, at, .. }) => (port, at, len),
                _ => continue,
            };
            let below = below.get(usize::from(port.0));
            let fits = below.is_some_and(|below| Extent { at: place, len }.within(below.size));
            assert!(fits && len > 0 && len <= block, "{name} over {below:?}: {io:?} to {place}");
        }
    }
}

/// A message of the FUSE protocol: no request leaves the file or the memory for it.
pub fn fuse_wire(bytes: &[u8]) {
    // The length in front is the kernel's word for how much it sent.
    let mut bytes = bytes.to_vec();
    if let (Some(front), Ok(len)) = (bytes.get(..4), u32::try_from(bytes.len()))
        && front[3] == 0
    {
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
    }
    let Ok((head, Ok(ask))) = wire::parse(&bytes) else { return };
    for read_only in [false, true] {
        let limits = Limits { volatile_cache: true, ..Limits::ideal(DISK) };
        if let Answer::Request(io) = Node::new("disk", &limits, read_only).answer(head, &ask) {
            assert!(!io.op.has_pages() || io.extent.len <= u64::from(MAX_WRITE), "{io:?}");
            assert!(io.op != Op::Read || io.extent.within(DISK), "{io:?}");
            assert!(!read_only || !io.op.changes(), "{io:?} of a read-only file");
        }
    }
}

/// What an NBD client sends, from the handshake on: nothing is kept beyond the limits, and a
/// request that is let in lies inside the device.
pub fn nbd_server(bytes: &[u8]) {
    let flags = can::HAS_FLAGS | can::FLUSH | can::FUA | can::TRIM | can::WRITE_ZEROES;
    let (name, description) = ("disk".to_owned(), String::new());
    let offer = Offer { name, description, size: DISK, flags, block: 512, preferred: 4096 };
    // What is sent decides which kind of server it is sent to.
    let tls = [Tls::Off, Tls::Offered, Tls::Required][bytes.len() % 3];
    let mut server = Handshake::new(vec![offer]).with_tls(tls);
    let mut is_secure = false;
    let (mut rest, cut) = (bytes, 1 + bytes.len() % 97);
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(cut)];
        let Ok(count) = server.receive(part) else { return };
        assert!(count <= part.len() && server.output().len() < MAX_WAITING + MAX_OPTION);
        if let Outcome::Chosen(session) = server.outcome() {
            assert!(tls != Tls::Required || is_secure, "chosen without TLS");
            return requests(session, &rest[count..]);
        }
        if *server.outcome() == Outcome::Closed {
            return;
        }
        let waiting = server.output().len();
        server.sent(waiting);
        if *server.outcome() == Outcome::Secure {
            assert!(tls != Tls::Off && !is_secure, "TLS where there is none, or twice");
            is_secure = true;
            server.secured();
        }
        rest = &rest[count..];
    }
}

fn requests(session: &Session, mut bytes: &[u8]) {
    while let Ok(Some(request)) = Request::parse(bytes, session.mode) {
        bytes = &bytes[session.mode.request_len()..];
        let skip = match session.admit(&request) {
            Ok(Ask::Write { .. }) => request.length,
            Ok(Ask::Disconnect) | Err(Refusal::Hopeless) => return,
            Err(Refusal::Reply { skip, .. }) => skip,
            Ok(_) => 0,
        };
        if let Ok(asked) = session.admit(&request)
            && asked != Ask::Flush
        {
            let extent = Extent { at: request.offset, len: request.length };
            let is_data = matches!(asked, Ask::Read | Ask::Write { .. });
            assert!(extent.len > 0 && extent.within(DISK), "{request:?}");
            assert!((extent.at | extent.len).is_multiple_of(512), "{request:?}");
            assert!(!is_data || extent.len <= u64::from(MAX_PAYLOAD), "{request:?}");
        }
        let Ok(skip) = usize::try_from(skip) else { return };
        bytes = bytes.get(skip..).unwrap_or_default();
    }
}

/// What an NBD server sends: a client keeps no more than the limits, and believes in no size that
/// has no sense.
pub fn nbd_client(bytes: &[u8]) {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let _ = Reply::parse(bytes, mode);
        let tls = bytes.len() % 2 == 1;
        let wish = Wish { name: "disk".to_owned(), mode, allocation: true, tls };
        let mut client = client::Handshake::new(wish);
        let mut is_secure = false;
        for part in bytes.chunks(1 + bytes.len() % 89) {
            if client.receive(part).is_err() {
                break;
            }
            assert!(client.output().len() < MAX_OPTION);
            if *client.outcome() == client::Outcome::Secure {
                client.secured();
                is_secure = true;
            }
        }
        if let client::Outcome::Chosen(agreed) = client.outcome() {
            assert!(!tls || is_secure, "chosen without TLS");
            assert!(agreed.block.is_power_of_two() && agreed.most >= agreed.block, "{agreed:?}");
            assert!(agreed.size <= i64::MAX as u64 && agreed.most <= MAX_PAYLOAD, "{agreed:?}");
        }
    }
}

/// An address of NBD: what is read is written such that it reads back.
pub fn nbd_uri(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(uri) = Uri::parse(text) {
        let shown = uri.to_string();
        let again = Uri::parse(&shown).ok();
        assert_eq!(again.as_ref(), Some(&uri), "{text} became {shown}");
    }
}

/// A file of users and their keys: what is read is written such that it reads back.
pub fn psk_file(bytes: &[u8]) {
    let Ok(keys) = devsplice_tls::parse_keys(bytes) else { return };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let lines = keys.iter().map(|key| format!("#{}:{}\n", hex(&key.user), hex(&key.secret)));
    let lines: String = lines.collect();
    let again = devsplice_tls::parse_keys(lines.as_bytes()).unwrap_or_default();
    assert!(again.len() == keys.len() && !keys.is_empty(), "{lines}");
    for (key, again) in keys.iter().zip(&again) {
        assert!(key.user == again.user && key.secret == again.secret, "{lines}");
        assert!((1..=128).contains(&key.user.len()) && (16..=64).contains(&key.secret.len()));
    }
}

/// What a server of NBD says to what was asked: nothing is placed outside of it, nothing is taken
/// that is not there, and it ends.
pub fn nbd_answers(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended][usize::from(first % 3)];
    let (at, len) = (1 << 16, 6000);
    let mut asks = Asks::new(4);
    asks.restart(mode, Some(1));
    for (key, command) in (0..).zip([command::READ, command::WRITE, command::BLOCK_STATUS]) {
        asks.begin(key, &Request { flags: 0, command, cookie: 0, offset: at, length: len });
    }
    let (mut rest, mut open) = (bytes, 3);
    loop {
        let Ok((taken, said)) = asks.next(rest) else { return };
        rest = &rest[taken..];
        match said {
            None if taken == 0 => {
                assert!(asks.room(rest.len()) > 0);
                return;
            }
            None => {}
            Some(Said::Data { key: 0, at, len: count }) => {
                assert!(u64::from(at) + u64::from(count) <= len);
                rest = rest.get(count as usize..).unwrap_or_default();
            }
            Some(Said::Hole { key: 0, at, len: count }) => {
                assert!(u64::from(at) + u64::from(count) <= len);
            }
            Some(Said::Done { .. }) => open -= 1,
            Some(other) => panic!("{other:?}"),
        }
        assert!(open >= 0, "more answers than questions");
    }
}
