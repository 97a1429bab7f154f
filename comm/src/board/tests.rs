use super::*;
use crate::{Collective, Single};

#[test]
fn one_rank_has_a_board_of_its_own() {
    let board = Board::start(&Single::new()).expect("nothing to fail");
    board.publish_step(7);
    board.publish_phase(Phase::Saving);
    let snapshot = board.snapshot(Duration::ZERO);
    let [RankStatus { rank: 0, state: RankState::Known(progress), .. }] = &snapshot[..] else {
        panic!("{snapshot:?}")
    };
    assert_eq!((progress.step, progress.phase), (Some(7), Phase::Saving));
    assert!(board.addresses().is_empty());
    assert_eq!(board.late(&[]), "");
}

/// The best of many tries, because the machine has other things to do.
#[test]
fn publishing_takes_less_than_a_microsecond() {
    let (table, _name) = Table::create(4).expect("shared memory");
    let record = &table.records()[2];
    record.claim(Identity::here());
    let best = |work: &dyn Fn(u64)| {
        let rounds = (0..50).map(|_| {
            let started = Instant::now();
            (0..1000).for_each(work);
            started.elapsed() / 1000
        });
        rounds.min().expect("some rounds")
    };
    let call = Call { collective: Collective::AllReduce, bucket: Some(3), step: None };
    let costs = [
        (
            "phase",
            best(&|i| record.set_phase(if i % 2 == 0 { Phase::Computing } else { Phase::Communicating })),
        ),
        ("step", best(&|i| record.set_step(i))),
        ("step time", best(&|i| record.set_step_time(Duration::from_nanos(i)))),
        ("enter", best(&|_| record.enter(call))),
        ("leave", best(&|_| record.leave())),
    ];
    println!("{costs:?}");
    for (what, cost) in costs {
        assert!(cost < Duration::from_micros(1), "{what} takes {cost:?}");
    }
}
