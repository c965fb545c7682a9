//! Answers for which of two ways large reads from memory take to a client of this machine, while
//! there is a CPU for it and for the thread that serves it: left in their file for the client to
//! copy from there, or copied into the socket by the thread.
//!
//! Leaving them takes the least work of all, but all of that falls to the client, and how long it
//! takes depends on what nobody here can see: some CPUs copy several times slower where source and
//! target lie a few bytes apart within their pages, as a file's pages and memory from `malloc` do.
//! So both ways are tried by turns, and the faster one is taken for a while.

/// Bytes that a way is measured over. A few milliseconds.
const PERIOD: u64 = 16 << 20;
/// Bytes at the start of that which are not counted: replies of the other way are still on theirs.
const SKIPPED: u64 = 2 << 20;
/// A client that asks for nothing for as long (ns) had something else to do.
const PAUSE: u64 = 2_000_000;
/// Periods until the other way is tried again: doubled each time that it is not the better one.
const FIRST_STAY: u16 = 16;
const MOST_STAY: u16 = 256;
/// What a way must be faster by to be changed to: this part.
const MARGIN: u64 = 16;

/// What is known of the two ways of a client.
#[derive(Debug)]
pub(super) struct Choice {
    /// The way that is taken now.
    lends: bool,
    /// It is only tried.
    is_trial: bool,
    /// What a MiB took with the other one, or with this one if it is not tried. Nanoseconds.
    best: u64,
    /// Periods until the other way is tried.
    left: u16,
    stay: u16,
    /// Bytes of this period, and how long those that count took.
    bytes: u64,
    ns: u64,
    last: Option<u64>,
}

impl Choice {
    /// Of a client of which nothing is known: it is lent to at first.
    pub(super) fn new() -> Choice {
        let stay = FIRST_STAY / 2;
        Choice { lends: true, is_trial: false, best: 0, left: 1, stay, bytes: 0, ns: 0, last: None }
    }

    /// A read of so many bytes has come, at `now` (ns). Whether its data is left in its file.
    pub(super) fn lends(&mut self, bytes: u64, now: u64) -> bool {
        let since = self.last.replace(now).map_or(u64::MAX, |last| now.saturating_sub(last));
        if since > PAUSE {
            return self.lends;
        }
        self.bytes += bytes;
        if self.bytes > SKIPPED {
            self.ns += since;
        }
        if self.bytes >= PERIOD {
            let took = (self.ns << 20) / (self.bytes - SKIPPED);
            (self.bytes, self.ns) = (0, 0);
            self.judge(took);
        }
        self.lends
    }

    /// A period is over, in which a MiB took so long.
    fn judge(&mut self, took: u64) {
        if !self.is_trial {
            self.best = took;
            self.left -= 1;
            if self.left == 0 {
                (self.is_trial, self.lends) = (true, !self.lends);
            }
            return;
        }
        if took < self.best - self.best / MARGIN {
            (self.best, self.stay) = (took, FIRST_STAY);
        } else {
            self.lends = !self.lends;
            self.stay = (self.stay * 2).min(MOST_STAY);
        }
        (self.is_trial, self.left) = (false, self.stay);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u64 = 128 << 10;

    /// A client that waits for each read, which takes so long, lent or copied. Of `reads`, how many
    /// were lent.
    fn serve(choice: &mut Choice, now: &mut u64, reads: u64, (lent, copied): (u64, u64)) -> u64 {
        let one = |_: &u64| {
            let is_lent = choice.lends(READ, *now);
            *now += if is_lent { lent } else { copied };
            is_lent
        };
        (0..reads).filter(one).count() as u64
    }

    #[test]
    fn the_faster_way_is_found_and_kept() {
        for ways in [(60_000, 50_000), (25_000, 50_000)] {
            let (mut choice, mut now) = (Choice::new(), 0);
            serve(&mut choice, &mut now, 4 * PERIOD / READ, ways);
            let reads = 100 * PERIOD / READ;
            let lent = serve(&mut choice, &mut now, reads, ways);
            let better = if ways.0 < ways.1 { lent } else { reads - lent };
            assert!(better >= reads / 100 * 94, "{better} of {reads}, where they take {ways:?}");
        }
    }

    #[test]
    fn both_ways_are_tried_at_the_start_and_what_is_as_good_is_not_changed() {
        let (mut choice, mut now) = (Choice::new(), 0);
        let in_period = PERIOD / READ;
        assert_eq!(serve(&mut choice, &mut now, in_period, (50_000, 49_000)), in_period);
        assert!(serve(&mut choice, &mut now, in_period, (50_000, 49_000)) <= 1);
        assert_eq!(serve(&mut choice, &mut now, in_period, (50_000, 49_000)), in_period);
    }

    #[test]
    fn a_client_that_has_changed_is_noticed() {
        let (mut choice, mut now) = (Choice::new(), 0);
        let reads = 1000 * PERIOD / READ;
        serve(&mut choice, &mut now, reads, (25_000, 50_000));
        serve(&mut choice, &mut now, (u64::from(MOST_STAY) + 3) * PERIOD / READ, (60_000, 50_000));
        let reads = 40 * PERIOD / READ;
        let lent = serve(&mut choice, &mut now, reads, (60_000, 50_000));
        assert!(lent <= reads / 10, "{lent} of {reads}");
    }

    #[test]
    fn pauses_of_the_client_say_nothing() {
        let (mut choice, mut now) = (Choice::new(), 0);
        for _ in 0..40 {
            now += 3 * PAUSE;
            // They fall on lent reads alone.
            while choice.lends(READ, now) && choice.bytes < PERIOD / 2 {
                now += 25_000;
            }
            while !choice.lends(READ, now) && choice.bytes < PERIOD / 2 {
                now += 50_000;
            }
        }
        let reads = 10 * PERIOD / READ;
        assert!(serve(&mut choice, &mut now, reads, (25_000, 50_000)) >= reads * 8 / 10);
    }
}
