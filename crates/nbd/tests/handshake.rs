//! Answers for handshakes: client and server of this crate against each other, bytes cut at any
//! place, and either against what chance sends.
#![allow(clippy::unwrap_used)]

use devsplice_nbd::client::{self, Wish};
use devsplice_nbd::limits::{MAX_OPTION, MAX_WAITING};
use devsplice_nbd::server::{Handshake, Offer, Outcome, Session};
use devsplice_nbd::wire::can;
use devsplice_nbd::{Broken, Mode};
use proptest::prelude::*;

fn offers() -> Vec<Offer> {
    ["disk", "other"]
        .map(|name| Offer {
            name: name.to_owned(),
            description: "a disk".to_owned(),
            size: 1 << 30,
            flags: can::HAS_FLAGS | can::FLUSH,
            block: 512,
            preferred: 4096,
        })
        .into()
}

fn wish(name: &str, mode: Mode) -> Wish {
    Wish { name: name.to_owned(), mode, allocation: true }
}

/// Lets both talk, `cut` bytes at a time, until neither has more to say.
fn talk(client: &mut client::Handshake, server: &mut Handshake, cut: usize) -> Result<(), Broken> {
    for _ in 0..100_000 {
        let (to_client, to_server) = (server.output().len(), client.output().len());
        if to_client == 0 && to_server == 0 {
            return Ok(());
        }
        let count = to_client.min(cut);
        let bytes = server.output()[..count].to_vec();
        let taken = client.receive(&bytes)?;
        server.sent(taken);
        let count = to_server.min(cut);
        let bytes = client.output()[..count].to_vec();
        let taken = server.receive(&bytes)?;
        client.sent(taken);
        if taken == 0 && count > 0 && *server.outcome() == Outcome::Closed {
            return Ok(());
        }
    }
    panic!("they talk for ever");
}

#[test]
fn both_agree_however_the_bytes_are_cut() {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        for cut in 1..70 {
            let mut client = client::Handshake::new(wish("disk", mode));
            let mut server = Handshake::new(offers());
            talk(&mut client, &mut server, cut).unwrap();
            let Outcome::Chosen(session) = server.outcome() else { panic!("not chosen") };
            let client::Outcome::Chosen(agreed) = client.outcome() else { panic!("not chosen") };
            assert_eq!((session.mode, agreed.mode), (mode, mode));
            assert_eq!((session.size, agreed.size), (1 << 30, 1 << 30));
            assert_eq!((session.flags, session.block), (agreed.flags, agreed.block));
            assert_eq!(session.flags & can::DF != 0, mode != Mode::Simple);
            assert_eq!(session.allocation, agreed.allocation.is_some());
            assert_eq!(session.allocation, mode != Mode::Simple);
        }
    }
}

#[test]
fn an_export_that_is_not_there_is_refused_in_words() {
    let mut client = client::Handshake::new(wish("none", Mode::Structured));
    let mut server = Handshake::new(offers());
    talk(&mut client, &mut server, 9).unwrap();
    let client::Outcome::Refused(reason) = client.outcome() else { panic!("not refused") };
    assert!(reason.contains("no such export"), "{reason}");
    assert_eq!(*server.outcome(), Outcome::Open, "it may ask for another");
}

/// What a client that knows the protocol by heart sends: options, one after the other.
fn options(all: &[(u32, &[u8])]) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    for (option, data) in all {
        bytes.extend(0x4948_4156_454f_5054_u64.to_be_bytes());
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(*data);
    }
    bytes
}

/// The kinds of the replies that are waiting.
fn kinds(server: &Handshake) -> Vec<u32> {
    let (mut rest, mut kinds) = (&server.output()[18..], Vec::new());
    while rest.len() >= 20 {
        let number = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
        kinds.push(number(12));
        rest = &rest[20 + number(16) as usize..];
    }
    kinds
}

const ERROR: u32 = 1 << 31;

#[test]
fn what_makes_no_sense_is_refused_and_the_handshake_goes_on() {
    let no_infos = [&4_u32.to_be_bytes()[..], b"disk", &[0, 0]].concat();
    let lie = [&5_u32.to_be_bytes()[..], b"disk", &[0, 0]].concat();
    let go_none = [&4_u32.to_be_bytes()[..], b"none", &[0, 0]].concat();
    let many = [&0_u32.to_be_bytes()[..], &65_u32.to_be_bytes()].concat();
    for (asked, answer) in [
        (vec![(3, &b"x"[..])], vec![ERROR | 3]),
        (vec![(7, &lie[..])], vec![ERROR | 3]),
        (vec![(7, &go_none[..])], vec![ERROR | 6]),
        (vec![(10, &many[..])], vec![ERROR | 3]),
        (vec![(8, &b""[..]), (10, &many[..])], vec![1, ERROR | 9]),
        (vec![(5, &b""[..])], vec![ERROR | 2]),
        (vec![(77, &b"??"[..])], vec![ERROR | 1]),
        (vec![(11, &b""[..]), (8, &b""[..])], vec![1, ERROR | 10]),
        (vec![(3, &b""[..])], vec![2, 2, 1]),
    ] {
        let mut server = Handshake::new(offers());
        let bytes = options(&asked);
        assert_eq!(server.receive(&bytes), Ok(bytes.len()));
        assert_eq!(kinds(&server), answer, "{asked:?}");
        assert_eq!(*server.outcome(), Outcome::Open);
        let go = &options(&[(7, &no_infos)])[4..];
        assert_eq!(server.receive(go), Ok(go.len()));
        assert!(
            matches!(server.outcome(), Outcome::Chosen(Session { size, .. }) if *size == 1 << 30)
        );
    }
}

#[test]
fn an_option_that_is_too_long_is_skipped_and_one_longer_than_any_ends_it() {
    let mut server = Handshake::new(offers());
    let data = vec![0; MAX_OPTION + 1];
    let bytes = options(&[(6, &data), (3, &[])]);
    assert_eq!(server.receive(&bytes), Ok(bytes.len()));
    assert_eq!(kinds(&server), [ERROR | 9, 2, 2, 1]);
    let mut server = Handshake::new(offers());
    let mut bytes = options(&[(6, &[])]);
    bytes[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(server.receive(&bytes).is_err());
}

#[test]
fn a_client_that_asks_for_ever_is_cut_off() {
    let mut server = Handshake::new(offers());
    let bytes = options(&[(77, &[][..]); 300]);
    let mut done = 0;
    let result = loop {
        match server.receive(&bytes[done..]) {
            Ok(count) => done += count,
            Err(broken) => break broken,
        }
        assert!(done < bytes.len(), "all were taken");
        let count = server.output().len();
        server.sent(count);
    };
    assert_eq!(result, Broken("too many options"));
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let mut server = Handshake::new(vec![offers().remove(0); 50]);
    let bytes = options(&[(3, &[][..]); 250]);
    let taken = server.receive(&bytes).unwrap();
    assert!(taken < bytes.len(), "all were taken");
    assert_eq!(server.receive(&bytes[taken..]), Ok(0));
    assert!(server.output().len() < MAX_WAITING + MAX_OPTION);
}

#[test]
fn first_requests_behind_the_choice_are_left_alone() {
    let mut server = Handshake::new(offers());
    let go = [&0_u32.to_be_bytes()[..], &[0, 0]].concat();
    let mut bytes = options(&[(7, &go)]);
    let len = bytes.len();
    bytes.extend([0x25, 0x60, 0x95, 0x13]);
    assert_eq!(server.receive(&bytes), Ok(len));
    assert_eq!(server.receive(&bytes[len..]), Ok(0));
}

proptest! {
    #[test]
    fn chance_breaks_neither_side(
        bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        option in 0_u32..13,
        greeted in any::<bool>(),
        cut in 1_usize..100,
    ) {
        let begin = options(&[(option, &bytes[..bytes.len().min(500)])]);
        let all = if greeted { [begin, bytes.clone()].concat() } else { bytes.clone() };
        let mut server = Handshake::new(offers());
        let mut client = client::Handshake::new(wish("disk", Mode::Extended));
        let mut greeting = server.output().to_vec();
        greeting.extend(&bytes);
        for part in all.chunks(cut) {
            match server.receive(part) {
                Ok(count) => prop_assert!(count <= part.len()),
                Err(_) => break,
            }
            prop_assert!(server.output().len() < MAX_WAITING + MAX_OPTION);
        }
        for part in if greeted { &greeting } else { &bytes }.chunks(cut) {
            if client.receive(part).is_err() {
                break;
            }
            prop_assert!(client.output().len() < MAX_OPTION);
        }
    }
}
