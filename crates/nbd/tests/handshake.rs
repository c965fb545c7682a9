//! Answers for handshakes: client and server of this crate against each other, bytes cut at any
//! place, and either against what chance sends.
#![allow(clippy::unwrap_used)]

use devsplice_nbd::client::{self, Wish};
use devsplice_nbd::limits::{MAX_OPTION, MAX_WAITING};
use devsplice_nbd::server::{Handshake, Offer, Outcome, Session, Tls};
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
    Wish { name: name.to_owned(), mode, allocation: true, tls: false }
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

/// Talks until TLS begins on both sides, then on inside, `cut` bytes at a time.
fn talk_inside(client: &mut client::Handshake, server: &mut Handshake, cut: usize) {
    talk(client, server, cut).unwrap();
    assert_eq!(*server.outcome(), Outcome::Secure);
    assert_eq!(*client.outcome(), client::Outcome::Secure);
    server.secured();
    client.secured();
    talk(client, server, cut).unwrap();
}

#[test]
fn tls_is_agreed_on_however_the_bytes_are_cut_and_all_is_chosen_inside() {
    for (tls, mode) in [(Tls::Offered, Mode::Extended), (Tls::Required, Mode::Structured)] {
        for cut in 1..70 {
            let wish = Wish { tls: true, ..wish("disk", mode) };
            let mut client = client::Handshake::new(wish);
            let mut server = Handshake::new(offers()).with_tls(tls);
            talk_inside(&mut client, &mut server, cut);
            let Outcome::Chosen(session) = server.outcome() else { panic!("not chosen") };
            assert!(matches!(client.outcome(), client::Outcome::Chosen(_)));
            assert_eq!((session.mode, session.allocation), (mode, true));
        }
    }
}

#[test]
fn who_wants_tls_and_does_not_get_it_goes_and_says_why() {
    for (server, reason) in [
        (Handshake::new(offers()), "speaks no TLS"),
        (Handshake::new(offers()).with_tls(Tls::Required), "wants TLS"),
    ] {
        let mut server = server;
        let tls = reason == "speaks no TLS";
        let mut client = client::Handshake::new(Wish { tls, ..wish("disk", Mode::Extended) });
        talk(&mut client, &mut server, 7).unwrap();
        let client::Outcome::Refused(said) = client.outcome() else { panic!("not refused") };
        assert!(said.contains(reason), "{said}");
        assert!(server.refused().is_some_and(|what| what.contains("TLS")));
    }
    let mut client = client::Handshake::new(Wish { tls: true, ..wish("disk", Mode::Simple) });
    let old = [&b"NBDMAGICIHAVEOPT"[..], &[0, 0]].concat();
    assert_eq!(client.receive(&old), Ok(18));
    assert!(matches!(client.outcome(), client::Outcome::Refused(_)), "it asked for an export");
    assert_eq!(client.output(), [0; 4], "nothing but flags was said");
}

/// With TLS required, a client without learns no name and gets no data, whatever it asks for.
#[test]
fn nothing_is_said_of_exports_before_tls_where_it_is_required() {
    let go = [&4_u32.to_be_bytes()[..], b"disk", &[0, 0]].concat();
    for option in [3, 6, 7, 8, 9, 10, 11, 77] {
        let mut server = Handshake::new(offers()).with_tls(Tls::Required);
        let bytes = options(&[(option, &go)]);
        assert_eq!(server.receive(&bytes), Ok(bytes.len()));
        assert_eq!(kinds(&server), [ERROR | 5], "{option}");
        assert_eq!(*server.outcome(), Outcome::Open);
    }
    let mut server = Handshake::new(offers()).with_tls(Tls::Required);
    let bytes = options(&[(1, b"disk")]);
    assert_eq!(server.receive(&bytes), Ok(bytes.len()));
    assert_eq!((server.outcome(), kinds(&server)), (&Outcome::Closed, vec![]));
    let mut server = Handshake::new(offers()).with_tls(Tls::Required);
    let _ = server.receive(&options(&[(2, &[])])).unwrap();
    assert_eq!((server.outcome(), kinds(&server)), (&Outcome::Closed, vec![1]));
}

/// What somebody else has put in front of the client's TLS must not have an effect inside it.
#[test]
fn what_was_said_before_tls_is_forgotten_and_what_is_sent_behind_it_is_not_taken() {
    let mut server = Handshake::new(offers()).with_tls(Tls::Offered);
    let context = [
        &4_u32.to_be_bytes()[..],
        b"disk",
        &1_u32.to_be_bytes(),
        &15_u32.to_be_bytes(),
        b"base:allocation",
    ]
    .concat();
    let go = [&4_u32.to_be_bytes()[..], b"disk", &[0, 0]].concat();
    let before = options(&[(11, &[]), (10, &context), (5, &[])]);
    let injected = &options(&[(7, &go)])[4..];
    let all = [&before[..], injected].concat();
    assert_eq!(server.receive(&all), Ok(before.len()));
    assert_eq!(*server.outcome(), Outcome::Secure);
    assert_eq!(server.receive(injected), Ok(0), "not as long as TLS has not begun");
    let count = server.output().len();
    server.sent(count);
    server.secured();
    assert_eq!(server.receive(injected), Ok(injected.len()));
    let Outcome::Chosen(session) = server.outcome() else { panic!("not chosen") };
    assert_eq!((session.mode, session.allocation), (Mode::Simple, false));
}

#[test]
fn tls_begins_once_and_without_data() {
    let mut server = Handshake::new(offers()).with_tls(Tls::Offered);
    let bytes = options(&[(5, b"x")]);
    assert_eq!(server.receive(&bytes), Ok(bytes.len()));
    assert_eq!((server.outcome(), kinds(&server)), (&Outcome::Open, vec![ERROR | 3]));
    let start = &options(&[(5, &[])])[4..];
    assert_eq!(server.receive(start), Ok(start.len()));
    assert_eq!(*server.outcome(), Outcome::Secure);
    let count = server.output().len();
    server.sent(count);
    server.secured();
    assert_eq!(server.receive(start), Ok(start.len()));
    assert_eq!(*server.outcome(), Outcome::Open);
    assert_eq!(server.output()[12..16], (ERROR | 3_u32).to_be_bytes());
}

proptest! {
    /// Bytes come in any portions, late, and end anywhere: nobody chooses without having said so.
    #[test]
    fn a_conversation_with_tls_survives_any_cut(
        cuts in proptest::collection::vec(1_usize..200, 1..40),
        end in 0_usize..600,
        required in any::<bool>(),
    ) {
        let tls = if required { Tls::Required } else { Tls::Offered };
        let mut server = Handshake::new(offers()).with_tls(tls);
        let mut client = client::Handshake::new(Wish { tls: true, ..wish("disk", Mode::Extended) });
        let (mut left, mut inside) = (end, false);
        for cut in cuts.iter().cycle().take(2000) {
            let count = server.output().len().min(*cut).min(left);
            let bytes = server.output()[..count].to_vec();
            server.sent(client.receive(&bytes).unwrap());
            left -= count;
            let count = client.output().len().min(*cut).min(left);
            let bytes = client.output()[..count].to_vec();
            client.sent(server.receive(&bytes).unwrap());
            left -= count;
            let both = *server.outcome() == Outcome::Secure
                && *client.outcome() == client::Outcome::Secure;
            if both && server.output().is_empty() {
                server.secured();
                client.secured();
                inside = true;
            }
            if left == 0 {
                break;
            }
        }
        let chosen = matches!(client.outcome(), client::Outcome::Chosen(_));
        prop_assert!(!chosen || inside);
        prop_assert!(left == 0 || chosen, "neither cut off nor done");
    }

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
