//! Answers for what the legs' superblocks say together: who holds the truth, who is stale, and when
//! nobody may decide.

use devsplice_core::prelude::*;

use super::format::{LegState, MOST_LEGS, Super};

/// What a port is to the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A leg of the set in this state, and whether what it lacks is all in the log.
    Leg { index: usize, state: LegState, logged: bool },
    /// Not of the set: nothing is written to it until it is added.
    Spare,
}

/// What was found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The newest superblock.
    pub(crate) newest: Super,
    /// By port.
    pub(crate) roles: Vec<Role>,
    /// Legs in sync by the newest superblock that are not among the ports.
    pub(crate) missing: Vec<usize>,
    /// The last generation that every leg in sync has.
    pub(crate) common: u64,
    /// Some leg that will be written has another superblock than the newest. Alone it would tell
    /// another story: of legs in sync that are not any more.
    pub(crate) differ: bool,
}

impl Found {
    /// Ports whose legs are in the state.
    pub(crate) fn ports(&self, wanted: LegState) -> u32 {
        let is = |role: &Role| matches!(role, Role::Leg { state, .. } if *state == wanted);
        self.roles.iter().enumerate().filter(|(_, role)| is(role)).map(|(port, _)| 1 << port).sum()
    }
}

/// Decides from what each port's newest superblock says, if it has any. With `degraded`, legs that
/// are in sync and not here are given up.
pub(crate) fn decide(supers: &[Option<Super>], degraded: bool) -> Result<Found> {
    let members: Vec<(usize, &Super)> = supers
        .iter()
        .enumerate()
        .filter_map(|(port, found)| found.as_ref().map(|found| (port, found)))
        .collect();
    let Some((newest_port, newest)) =
        members.iter().copied().max_by_key(|(_, found)| found.generation)
    else {
        return Err(Error::invalid("mirror", "none of the devices has a mirror's metadata")
            .next("devsplice format makes it"));
    };
    for (port, found) in &members {
        if found.set != newest.set || found.size != newest.size || found.region != newest.region {
            let reason = format!("device {port} belongs to another mirror than {newest_port}");
            return Err(Error::invalid("mirror", reason)
                .next("leave it out, or erase the last 64 KiB of the one that is wrong"));
        }
    }
    let mut roles = vec![Role::Spare; supers.len()];
    let mut seen = [None; MOST_LEGS];
    for (port, own) in &members {
        let index = usize::from(own.own);
        if let Some(other) = seen[index].replace(*port) {
            let reason = format!("devices {other} and {port} are both leg {index}: copies?");
            return Err(Error::invalid("mirror", reason).next("leave one of them out"));
        }
        split(own, *port, newest, newest_port)?;
        roles[*port] = role(own, newest);
    }
    let here = |index: &usize| seen[*index].is_some();
    let in_sync = |index: &usize| newest.legs[*index].state == LegState::InSync;
    let missing: Vec<_> =
        (0..newest.leg_count()).filter(|index| in_sync(index) && !here(index)).collect();
    let (common, differ) = (newest.generation, false);
    let mut found = Found { newest: *newest, roles, missing, common, differ };
    for (port, own) in &members {
        let Role::Leg { state, .. } = found.roles[*port] else { continue };
        if state == LegState::InSync {
            found.common = found.common.min(own.generation);
        }
        found.differ |= state != LegState::Failed && Super { own: newest.own, ..**own } != *newest;
    }
    if found.ports(LegState::InSync) == 0 {
        let reason = "no device here is in sync: the legs that hold the data are missing";
        return Err(Error::invalid("mirror", reason).next("give the others as well"));
    }
    if !found.missing.is_empty() && !degraded {
        let reason = format!("leg {} is in sync and missing", found.missing[0]);
        return Err(Error::invalid("mirror", reason)
            .next("give it as well, or degraded=on to go on without it"));
    }
    Ok(found)
}

/// Refuses legs that have both been written while the other was away.
fn split(own: &Super, port: usize, newest: &Super, newest_port: usize) -> Result<()> {
    let index = usize::from(own.own);
    let thinks_it_is_in_sync = own.legs[index].state == LegState::InSync;
    let given_up = newest.legs[index];
    let went_on = given_up.state != LegState::InSync && own.generation >= given_up.since;
    if port != newest_port && thinks_it_is_in_sync && went_on {
        let reason = format!(
            "devices {newest_port} and {port} have both been written while the other was missing"
        );
        return Err(Error::invalid("mirror", reason)
            .next("erase the last 64 KiB of the one to give up, then add it"));
    }
    Ok(())
}

fn role(own: &Super, newest: &Super) -> Role {
    let index = usize::from(own.own);
    let leg = newest.legs[index];
    let was_in_sync = own.legs[index].state == LegState::InSync;
    match leg.state {
        // A change of states is on every leg in sync before the next one begins, so one that is
        // further behind was not written by us.
        LegState::InSync if was_in_sync && own.generation >= newest.before => {
            Role::Leg { index, state: LegState::InSync, logged: true }
        }
        // One that was being filled before that has been given up since, or another device has
        // had its place.
        LegState::Rebuilding if own.legs[index] == leg => {
            Role::Leg { index, state: LegState::Rebuilding, logged: true }
        }
        state => {
            // Regions are never cleaned while a leg is missing, so the log knows what it lacks.
            let logged =
                state == LegState::Failed && was_in_sync && own.generation + 1 == leg.since;
            Role::Leg { index, state: LegState::Failed, logged }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::Leg;
    use super::*;

    const IN: LegState = LegState::InSync;

    fn block(own: u8, generation: u64, legs: &[(LegState, u64)]) -> Option<Super> {
        let mut all = [Leg::default(); MOST_LEGS];
        for (leg, (state, since)) in all.iter_mut().zip(legs) {
            *leg = Leg { state: *state, since: *since, before: since - 1 };
        }
        let before = generation - 1;
        Some(Super {
            set: [1; 16],
            generation,
            before,
            size: 1 << 20,
            region: 4096,
            own,
            legs: all,
        })
    }

    fn states(found: &Found) -> Vec<LegState> {
        let state = |role: &Role| match role {
            Role::Leg { state, .. } => *state,
            Role::Spare => LegState::None,
        };
        found.roles.iter().map(state).collect()
    }

    fn refusal(supers: &[Option<Super>], degraded: bool) -> String {
        decide(supers, degraded).unwrap_err().to_string()
    }

    #[test]
    fn legs_of_one_generation_are_all_in_sync_in_any_order() {
        let legs = [(IN, 1), (IN, 1)];
        let found = decide(&[block(1, 1, &legs), block(0, 1, &legs)], false).unwrap();
        assert_eq!(states(&found), [IN, IN]);
        assert_eq!(found.ports(IN), 0b11);
    }

    #[test]
    fn a_dropped_leg_is_stale_and_the_log_knows_what_it_lacks() {
        let (old, new) = ([(IN, 1), (IN, 1)], [(IN, 1), (LegState::Failed, 2)]);
        let found = decide(&[block(0, 2, &new), block(1, 1, &old)], false).unwrap();
        let stale = Role::Leg { index: 1, state: LegState::Failed, logged: true };
        assert_eq!(found.roles[1], stale);
        // Two drops later it is still known; a leg from before is not.
        let newer = [(IN, 1), (LegState::Failed, 2), (LegState::Failed, 3)];
        let found = decide(&[block(0, 3, &newer), block(1, 1, &old)], false).unwrap();
        assert_eq!(found.roles[1], stale);
        let later = [(IN, 1), (LegState::Failed, 9)];
        let found = decide(&[block(0, 9, &later), block(1, 1, &old)], false).unwrap();
        assert_eq!(found.roles[1], Role::Leg { index: 1, state: LegState::Failed, logged: false });
    }

    #[test]
    fn a_change_that_reached_one_leg_only_holds() {
        let old = [(IN, 1), (IN, 1), (IN, 1)];
        let new = [(IN, 1), (IN, 1), (LegState::Failed, 2)];
        let found = decide(&[block(0, 2, &new), block(1, 1, &old), block(2, 1, &old)], false);
        assert_eq!(states(&found.unwrap()), [IN, IN, LegState::Failed]);
    }

    #[test]
    fn a_leg_that_is_further_behind_is_not_believed() {
        let legs = [(IN, 1), (IN, 1)];
        let found = decide(&[block(0, 5, &legs), block(1, 3, &legs)], false).unwrap();
        assert_eq!(states(&found), [IN, LegState::Failed]);
    }

    #[test]
    fn attempts_that_failed_in_between_count_for_nothing() {
        let legs = [(IN, 1), (IN, 1)];
        let newest = block(0, 5, &legs).map(|newest| Super { before: 2, ..newest });
        assert_eq!(states(&decide(&[newest, block(1, 2, &legs)], false).unwrap()), [IN, IN]);
        // One that tells of such an attempt is stale, not split.
        let legs = [(LegState::Failed, 3), (IN, 1)];
        let gone = block(0, 5, &[(IN, 1), (LegState::Failed, 5)]);
        let found = decide(&[gone, block(1, 3, &legs)], false).unwrap();
        assert_eq!(states(&found), [IN, LegState::Failed]);
    }

    #[test]
    fn legs_that_both_went_on_alone_are_refused() {
        let a = block(0, 2, &[(IN, 1), (LegState::Failed, 2)]);
        let b = block(1, 2, &[(LegState::Failed, 2), (IN, 1)]);
        for degraded in [false, true] {
            assert!(refusal(&[a, b], degraded).contains("both been written"));
        }
        let b = block(1, 5, &[(LegState::Failed, 2), (IN, 1)]);
        assert!(refusal(&[a, b], false).contains("both been written"));
    }

    #[test]
    fn a_missing_leg_needs_a_word_from_the_user() {
        let legs = [(IN, 1), (IN, 1)];
        assert!(refusal(&[block(0, 1, &legs)], false).contains("leg 1 is in sync and missing"));
        let found = decide(&[block(0, 1, &legs)], true).unwrap();
        assert_eq!(found.missing, [1]);
        // One that had been dropped before is not missed.
        let dropped = [(IN, 1), (LegState::Failed, 2)];
        assert!(decide(&[block(0, 2, &dropped)], false).is_ok());
    }

    #[test]
    fn strangers_copies_and_blanks_are_told_apart() {
        let legs = [(IN, 1), (IN, 1)];
        let (a, b) = (block(0, 1, &legs), block(1, 1, &legs));
        assert!(refusal(&[None, None], false).contains("none of the devices"));
        assert!(refusal(&[a, b, a], false).contains("both leg 0"));
        let stranger = a.map(|a| Super { set: [2; 16], ..a });
        assert!(refusal(&[b, stranger], true).contains("another mirror"));
        let found = decide(&[a, None, b], false).unwrap();
        assert_eq!(found.roles[1], Role::Spare);
        // The one with the data is not there.
        let stale = block(1, 2, &[(IN, 1), (LegState::Rebuilding, 2)]);
        assert!(refusal(&[stale], true).contains("no device here is in sync"));
    }
}
