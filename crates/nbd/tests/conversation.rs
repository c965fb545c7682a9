//! Answers for what is asked over one connection after another: what is held is asked again, and no
//! request goes on for ever because it ends all connections while others are answered.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use devsplice_core::Op;
use devsplice_nbd::client::conversation::{Question, Verdict};
use devsplice_nbd::client::{Agreed, Conversation, Patience, Said};
use devsplice_nbd::wire::{Head, can};
use devsplice_nbd::{Mode, Request};

const FLAGS: u16 = can::HAS_FLAGS | can::FLUSH | can::FUA;
const OUTAGE: u32 = 60;
const PATIENCE: Patience = Patience { answer: 60, outage: Some(OUTAGE) };
const KEYS: u32 = 32;

fn agreed() -> Agreed {
    let (mode, size) = (Mode::Simple, 1 << 20);
    Agreed {
        mode,
        flags: FLAGS,
        size,
        block: 512,
        preferred: 4096,
        most: 1 << 20,
        allocation: None,
    }
}

/// A client, and what its server has been asked and has not answered.
struct Both {
    talk: Conversation,
    asked: Vec<(u32, u64)>,
}

impl Both {
    fn new(patience: Patience) -> Both {
        Both { talk: Conversation::new(KEYS, &agreed(), patience), asked: Vec::new() }
    }

    fn ask(&mut self, key: u32, at: u64) {
        let question = Question { op: Op::Write, fua: false, at, len: 512 };
        assert_eq!(self.talk.ask(key, question), None);
    }

    /// Sends all that may be sent; which were.
    fn send(&mut self) -> Vec<u32> {
        let mut keys = Vec::new();
        while let Some((key, _)) = self.talk.first_unsent() {
            let head = self.talk.send().unwrap();
            let request = Request::parse(head.bytes(), Mode::Simple).unwrap().unwrap();
            self.asked.push((key, request.cookie));
            assert_eq!(self.talk.sent(key), None);
            keys.push(key);
        }
        keys
    }

    /// The server answers.
    fn answer(&mut self, key: u32) {
        let place = self.asked.iter().position(|asked| asked.0 == key).unwrap();
        let (_, cookie) = self.asked.remove(place);
        let head = Head::done(Mode::Simple, (cookie, 0), 0);
        assert_eq!(self.talk.next(head.bytes()), Ok((head.bytes().len(), None)));
        assert_eq!(self.talk.next(&[]), Ok((0, Some(Said::Done { key, result: Ok(()) }))));
        assert_eq!(self.talk.answered(key, Ok(())), (None, Verdict::Over(Ok(()))));
    }

    fn lose(&mut self) {
        assert!(self.talk.lose() && self.talk.hold());
        self.asked.clear();
    }

    /// What fails alone; and whatever else does.
    fn failed(&mut self) -> (Vec<u32>, Vec<u32>) {
        let accused: Vec<_> = std::iter::from_fn(|| self.talk.accused()).collect();
        let is_all = self.talk.give_up().is_some();
        let all: Vec<_> = std::iter::from_fn(|| self.talk.abandoned()).collect();
        assert_eq!(is_all, !all.is_empty());
        (accused.iter().filter(|one| one.is_over).map(|one| one.key).collect(), all)
    }

    /// A connection of a second, over which all but `kept` are answered.
    fn round(&mut self, kept: &[u32]) {
        self.talk.connected(&agreed());
        // Answers may have more asked.
        for _ in 0..KEYS {
            let sent = self.send();
            if sent.is_empty() {
                break;
            }
            for key in sent.into_iter().filter(|key| !kept.contains(key)) {
                self.answer(key);
            }
        }
        self.talk.second();
        self.lose();
    }
}

#[test]
fn a_request_that_ends_each_connection_fails_alone_while_others_are_answered() {
    let mut both = Both::new(PATIENCE);
    both.ask(0, 0);
    for round in 0..1000 {
        both.ask(1, 512);
        both.round(&[0]);
        let failed = both.failed();
        if failed == (vec![], vec![]) {
            continue;
        }
        assert_eq!(failed, (vec![0], vec![]));
        assert!(round >= OUTAGE, "after {round} s");
        // Its key is free.
        both.ask(0, 0);
        both.round(&[]);
        assert_eq!((both.talk.owed(), both.failed()), (0, (vec![], vec![])));
        return;
    }
    panic!("it is asked for ever");
}

#[test]
fn who_wants_to_hold_for_ever_does_and_is_told_which_request_it_is() {
    let mut both = Both::new(Patience { outage: None, ..PATIENCE });
    both.ask(0, 0);
    let mut told = Vec::new();
    for _ in 0..1000 {
        both.ask(1, 512);
        both.round(&[0]);
        told.extend(std::iter::from_fn(|| both.talk.accused()));
        assert_eq!((both.talk.give_up(), both.talk.owed()), (None, 1));
    }
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].key == 0 && !told[0].is_over, "{told:?}");
}

#[test]
fn those_that_are_lost_beside_it_are_asked_apart_from_it_and_answered() {
    let mut both = Both::new(PATIENCE);
    // 5 ends the connection before any of those that are sent with it are answered.
    (0..KEYS).for_each(|key| both.ask(key, u64::from(key) * 512));
    let mut left = KEYS;
    for _ in 0..1000 {
        both.talk.connected(&agreed());
        while let sent = both.send()
            && !sent.is_empty()
            && !sent.contains(&5)
        {
            sent.iter().for_each(|key| both.answer(*key));
            left -= sent.len() as u32;
        }
        if left == 0 {
            break;
        }
        both.talk.second();
        both.lose();
        let (alone, all) = both.failed();
        assert_eq!(all, [], "a server is away that has answered");
        if !alone.is_empty() {
            assert_eq!((alone, left), (vec![5], 1));
            return;
        }
    }
    panic!("{left} are left");
}

#[test]
fn connections_that_end_now_and_then_fail_nothing() {
    let mut both = Both::new(PATIENCE);
    both.ask(0, 0);
    // Slow, and lost with four connections; then as often as there are seconds to wait.
    for _ in 0..4 {
        both.ask(1, 512);
        both.round(&[0]);
        (0..OUTAGE).for_each(|_| assert_eq!(both.talk.second(), None));
        assert_eq!(both.failed(), (vec![], vec![]));
    }
    both.round(&[]);
    assert_eq!((both.talk.owed(), both.failed()), (0, (vec![], vec![])));
    both.ask(0, 0);
    for _ in 0..OUTAGE {
        both.ask(1, 512);
        both.round(&[0]);
        assert_eq!(both.failed(), (vec![], vec![]));
    }
    both.round(&[]);
    assert_eq!((both.talk.owed(), both.failed()), (0, (vec![], vec![])));
}

#[test]
fn a_suspect_without_an_answer_keeps_the_others_waiting_for_no_longer_than_a_silent_server() {
    let mut both = Both::new(Patience { answer: 10, outage: None });
    [0, 1, 2].into_iter().for_each(|key| both.ask(key, u64::from(key) * 512));
    for _ in 0..3 {
        both.round(&[0, 1, 2]);
    }
    both.talk.connected(&agreed());
    assert_eq!(both.send(), [0]);
    let mut later = Vec::new();
    for second in 1..=25 {
        // The server goes on with all else.
        both.ask(3, 4096);
        assert_eq!(both.send(), [3]);
        both.talk.hear();
        both.answer(3);
        assert_eq!(both.talk.second(), None);
        later.extend(both.send().into_iter().map(|key| (second, key)));
    }
    assert_eq!(later, [(11, 1), (22, 2)]);
    [2, 0, 1].into_iter().for_each(|key| both.answer(key));
    assert_eq!((both.talk.owed(), both.failed()), (0, (vec![], vec![])));
}

#[test]
fn suspects_fail_with_the_rest_when_the_server_is_away() {
    let mut both = Both::new(PATIENCE);
    (0..4).for_each(|key| both.ask(key, 0));
    for _ in 0..4 {
        both.round(&[0, 1, 2, 3]);
    }
    both.ask(4, 0);
    (0..=OUTAGE).for_each(|_| assert_eq!(both.talk.second(), None));
    let (alone, mut all) = both.failed();
    all.sort_unstable();
    assert_eq!((alone, all, both.talk.owed()), (vec![], vec![0, 1, 2, 3, 4], 0));
}
