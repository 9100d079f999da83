//! Extents with stripes on several drives: the drives read them into one slot at the same time.

use super::*;

/// Extent `index` of all files: its stripes are the extents of that number in files 0, 1 and 2, cut to these pages.
const PAGES: [usize; 3] = [3, 5, 1];

fn byte(file: u16, index: usize) -> u8 {
    16 * file as u8 + index as u8 + 1
}

fn stripes(index: usize) -> Vec<StripeRead> {
    let stripe = |(file, pages): (u16, usize)| {
        let (len, offset) = (pages * PAGE_BYTES, (index * EXTENT) as u64);
        StripeRead { file, offset, len, checksum: xxh3_64(&vec![byte(file, index); len]) }
    };
    // The volumes of a model are in order; files need not be.
    [(1, PAGES[1]), (0, PAGES[0]), (2, PAGES[2])].map(stripe).to_vec()
}

fn bytes(index: usize) -> Vec<u8> {
    stripes(index).iter().flat_map(|stripe| vec![byte(stripe.file, index); stripe.len]).collect()
}

fn striped_slots(count: usize) -> Vec<Slot> {
    Arena::uniform(9 * PAGE_BYTES, count, "test").expect("memory").into_slots()
}

fn submit_striped(io: &Scheduler, slot: Slot, index: usize, check: Check) -> PendingRead {
    io.submit_stripes(slot, ExtentRead { check, ..extent(0, index) }, &stripes(index)).expect("accepted")
}

#[test]
fn stripes_come_together_in_their_order() {
    for seed in 0..20 {
        let drives = drives();
        drives.iter().for_each(|drive| drive.set_short_reads(100));
        let io = start_both(&drives, seed);
        for check in [Check::Here, Check::ByReceiver, Check::Again] {
            let reads = striped_slots(EXTENTS).into_iter().enumerate();
            let reads: Vec<_> = reads.map(|(index, slot)| submit_striped(&io, slot, index, check)).collect();
            for (index, read) in reads.into_iter().enumerate() {
                let expect = bytes(index);
                if check == Check::ByReceiver {
                    while !read.is_done() {
                        let prefix = read.prefix();
                        assert!(*prefix == expect[..prefix.len()]);
                    }
                    assert_eq!(read.prefix().len(), expect.len());
                }
                assert_eq!(read.len(), expect.len());
                assert!(read.finish().expect("ready").bytes() == expect, "extent {index}");
            }
        }
        // An extent counts once, whatever its stripes.
        assert_eq!(io.stats().extents, 3 * EXTENTS as u64);
    }
}

#[test]
fn a_stripe_that_lacks_keeps_the_extent_waiting_and_the_others_are_there() {
    let drives = drives();
    drives[1].hold();
    let io = start_both(&drives, 4);
    // File 1 is on the second drive, and first in memory.
    let read = submit_striped(&io, striped_slots(1).remove(0), 3, Check::ByReceiver);
    while io.lane_stats().next().expect("a lane").chunks < 3 {
        std::thread::yield_now();
    }
    assert!(!read.is_done() && read.prefix().is_empty());
    drives[1].release();
    assert!(read.finish().expect("ready").bytes() == bytes(3));
}

#[test]
fn a_damaged_stripe_is_read_again_alone_or_named() {
    for times in [1, u32::MAX] {
        let drives = drives();
        // In file 2, which is file 1 of the first drive.
        let at = (5 * EXTENT) as u64;
        drives[0].add_fault(Fault { kind: FaultKind::Flip, file: 1, range: at..at + 1, times });
        let io = start_both(&drives, 8);
        let read = submit_striped(&io, striped_slots(1).remove(0), 5, Check::Here);
        match (read.finish(), times) {
            (Ok(slot), 1) => assert!(slot.bytes() == bytes(5)),
            (Err(failure), u32::MAX) => {
                let text = failure.error.to_string();
                assert!(text.contains("sim:1") && text.contains(&format!("offset {at}")), "{text}");
                assert!(matches!(*failure.error, ReadError::Checksum { len: PAGE_BYTES, .. }), "{text}");
                assert!(failure.slot.is_some(), "the slot is as good as new");
            }
            (finished, _) => panic!("{times} times: {:?}", finished.map(|slot| slot.bytes().len())),
        }
        assert_eq!(io.stats().checksum_retries, 1);
    }
}

#[test]
fn cancelling_reaches_every_stripe() {
    let drives = drives();
    drives.iter().for_each(SimDrive::hold);
    let io = start_both(&drives, 6);
    let reads = striped_slots(EXTENTS).into_iter().enumerate();
    let reads: Vec<_> = reads.map(|(index, slot)| submit_striped(&io, slot, index, Check::Here)).collect();
    reads[1..].iter().for_each(PendingRead::cancel);
    drives.iter().for_each(SimDrive::release);
    let mut reads = reads.into_iter();
    assert!(reads.next().expect("the first").finish().expect("ready").bytes() == bytes(0));
    for (index, read) in (1..).zip(reads) {
        match read.finish() {
            Ok(slot) => assert!(slot.bytes() == bytes(index), "it was too late"),
            Err(failure) => assert!(failure.error.is_cancelled() && failure.slot.is_some(), "{}", failure.error),
        }
    }
}

#[test]
fn a_dead_drive_fails_what_has_a_stripe_on_it() {
    let drives = drives();
    let io = special(&drives, [false, true], &Arc::default());
    for round in 0..3 {
        let read = submit_striped(&io, striped_slots(1).remove(0), round, Check::Here);
        let error = read.finish().expect_err("one drive is gone").error;
        assert!(error.to_string().contains("the drive was pulled out"), "{error}");
        submit(&io, &[0, 2]).into_iter().for_each(finish_right);
    }
}

#[test]
fn stripes_that_do_not_fit_are_refused() {
    let drives = drives();
    let io = start_both(&drives, 2);
    let refused = |slot: Slot, stripes: &[StripeRead]| {
        let failure = io.submit_stripes(slot, extent(0, 0), stripes).expect_err("refused");
        assert!(matches!(*failure.error, ReadError::Request { .. }) && failure.slot.is_some(), "{}", failure.error);
        failure.error.to_string()
    };
    // Each fits, all together do not.
    assert!(refused(slots(1).remove(0), &stripes(0)).contains("larger than the slot"));
    let mut odd = stripes(0);
    odd[1].offset += 1;
    assert!(refused(striped_slots(1).remove(0), &odd).contains("multiples of 4096"));
    let many = vec![StripeRead { len: PAGE_BYTES, ..stripes(0)[0] }; 17];
    let slot = Arena::uniform(17 * PAGE_BYTES, 1, "test").expect("memory").into_slots().remove(0);
    assert!(refused(slot, &many).contains("at most 16"));
}
