//! Answers for clients whose questions about ranges take long: a server below answers late.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use devsplice_nbd::Mode;
use devsplice_nbd::client::{Agreed, Extent, Patience};
use devsplice_nbd::wire::{can, command};
use devsplice_uring::{Line, Remote, Standing};

use crate::peer::{Host, Peer, SIZE, pattern};

/// How long memory must have been given back if anybody gives it back: two ticks, and some more.
const IDLE: Duration = Duration::from_millis(3500);

/// A server that nobody can connect to, and which answers questions when a test lets it.
struct Late {
    agreed: Agreed,
    forsaken: AtomicBool,
    /// Questions that wait, and whether they may go on.
    asked: Mutex<(u32, bool)>,
    changed: Condvar,
}

impl Late {
    fn new() -> Arc<Late> {
        let agreed = Agreed {
            mode: Mode::Structured,
            flags: can::HAS_FLAGS | can::FLUSH,
            size: SIZE,
            block: 512,
            preferred: 4096,
            most: 32 << 20,
            allocation: Some(1),
        };
        let (asked, changed) = (Mutex::default(), Condvar::new());
        Arc::new(Late { agreed, forsaken: AtomicBool::new(false), asked, changed })
    }

    /// Waits until a question has arrived.
    fn wait(&self) {
        let (asked, patience) = (self.asked.lock().unwrap(), Duration::from_secs(20));
        let wait = self.changed.wait_timeout_while(asked, patience, |(count, _)| *count == 0);
        assert!(!wait.unwrap().1.timed_out(), "nobody asks");
    }

    fn go_on(&self) {
        self.asked.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

impl Remote for Late {
    fn name(&self) -> &str {
        "late"
    }
    fn agreed(&self) -> &Agreed {
        &self.agreed
    }
    fn patience(&self) -> Patience {
        Patience { answer: 0, outage: None }
    }
    fn forsake(&self) {
        self.forsaken.store(true, Ordering::Relaxed);
    }
    fn is_forsaken(&self) -> bool {
        self.forsaken.load(Ordering::Relaxed)
    }
    fn dial(&self, _: &Arc<Line>, _: Option<&str>) {}
    fn part(&self) {}
    fn most_lines(&self) -> u16 {
        1
    }
    fn tell(&self, text: &str) {
        eprintln!("{text}");
    }
    fn listen(&self, _: Box<dyn Fn(&str) + Send>) {}
    fn standing(&self) -> Standing {
        Standing::default()
    }
    fn look_ahead(&self) {}
    fn look(&self, _: u64, _: u64) -> Option<Extent> {
        None
    }
    fn look_now(&self, _: u64, most: u64, _: Instant) -> Option<Vec<Extent>> {
        let mut asked = self.asked.lock().unwrap();
        asked.0 += 1;
        self.changed.notify_all();
        let patience = Duration::from_secs(20);
        let waits = |(_, may): &mut (u32, bool)| !*may;
        drop(self.changed.wait_timeout_while(asked, patience, waits).unwrap());
        Some(vec![Extent { len: most.min(SIZE), is_hole: true, is_zero: true }])
    }
    fn tells_now(&self) -> bool {
        true
    }
}

/// A disk of the file and a late server, whose clients have one request each at a time.
fn host(name: &str) -> (Arc<Late>, Host) {
    let late = Late::new();
    let server: Arc<dyn Remote> = late.clone();
    let host = Host::new(name, |wishes| {
        (wishes.server, wishes.depth, wishes.threads) = (Some(server), 1, 1);
    });
    (late, host)
}

/// Asks what the server has, and for more behind that, which has come and waits for its turn.
fn ask(peer: &mut Peer, late: &Late, behind: &[u8]) -> u64 {
    let question = peer.request(command::BLOCK_STATUS, 0, (SIZE, 4096));
    let cookie = peer.last_cookie();
    peer.send(&[&question, behind].concat());
    late.wait();
    cookie
}

/// The engine has nothing to do meanwhile, and gives memory back that nobody needs.
#[test]
fn requests_behind_a_question_that_takes_seconds_are_done_as_they_came() {
    for mode in [Mode::Structured, Mode::Extended] {
        let (late, host) = host("behind");
        let mut peer = host.peer(mode);
        let (old, new) = (pattern(4096, 1), pattern(20_000 / 512 * 512, 2));
        assert_eq!(peer.write(0, &old, 0), 0);
        // So that the engine looks twice whether it has anything to do.
        assert_eq!(peer.read(0, 4096).as_ref(), Ok(&old));
        let mut behind = peer.request(command::READ, 0, (0, 4096));
        behind.extend(peer.request(command::WRITE, 0, (8192, new.len() as u64)));
        behind.extend(&new);
        behind.extend(peer.request(command::READ, 0, (8192, new.len() as u64)));
        let last = peer.last_cookie();
        let question = ask(&mut peer, &late, &behind);
        std::thread::sleep(IDLE);
        late.go_on();
        let (cookie, answer) = peer.reply();
        assert_eq!((cookie, answer.error), (question, 0), "{mode:?}");
        for (cookie, expected) in [(last - 2, &old[..]), (last - 1, &[]), (last, &new)] {
            let (answered, answer) = peer.reply();
            assert_eq!((answered, answer.error), (cookie, 0), "{mode:?}");
            assert!(answer.data == expected, "{mode:?}: the answer to {cookie} differs");
        }
        assert_eq!(host.file(8192, new.len()), new);
    }
}
