//! When the reads of a simulated drive end: arithmetic on nanoseconds, without a clock.

use std::time::Duration;

/// The speed of a simulated drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriveSpeed {
    /// Bytes per second that it moves; 0 counts as 1.
    pub bytes_per_second: u64,
    /// From the request to the first byte.
    pub latency: Duration,
}

impl DriveSpeed {
    /// An infinitely fast drive: every read ends at once.
    pub const UNLIMITED: DriveSpeed = DriveSpeed { bytes_per_second: u64::MAX, latency: Duration::ZERO };

    /// Nanoseconds for which a read of this many bytes occupies the bus, rounded down.
    fn transfer_ns(self, bytes: usize) -> u64 {
        let ns = bytes as u128 * 1_000_000_000 / u128::from(self.bytes_per_second.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    pub(super) fn latency_ns(self) -> u64 {
        u64::try_from(self.latency.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The bus of a drive, over which all reads go one after the other in the order in which they were submitted.
///
/// A read of `b` bytes that is submitted at `t` ends at
///
/// ```text
/// max(end of the read before it, t + latency) + b ÷ bandwidth
/// ```
///
/// So the latencies of reads that are in flight together overlap, and their transfers do not: with `d` reads of `b` bytes always in
/// flight the drive gives `min(bandwidth, d × b ÷ (latency + b ÷ bandwidth))`. The caller decides how many are in
/// flight; the drive takes any number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bus {
    free_at: u64,
}

impl Bus {
    /// The end of a read that is submitted at `now`, which is not before that of the last one. Times are nanoseconds since a moment
    /// that stays the same.
    pub fn submit(&mut self, speed: DriveSpeed, now: u64, bytes: usize) -> u64 {
        let first_byte = now.saturating_add(speed.latency_ns()).max(self.free_at);
        self.free_at = first_byte.saturating_add(speed.transfer_ns(bytes));
        self.free_at
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const US: u64 = 1_000;
    /// 4 GB/s move 4000 bytes in a microsecond.
    const DRIVE: DriveSpeed = DriveSpeed { bytes_per_second: 4_000_000_000, latency: Duration::from_micros(80) };

    /// Ends of `reads` reads of `bytes`, of which `depth` are in flight: each of the others is submitted when one ends.
    fn ends(speed: DriveSpeed, reads: usize, bytes: usize, depth: usize) -> Vec<u64> {
        let (mut bus, mut flying, mut ends, mut now) = (Bus::default(), VecDeque::new(), Vec::new(), 0);
        for _ in 0..reads {
            if flying.len() == depth {
                now = flying.pop_front().expect("as many as the depth");
                ends.push(now);
            }
            flying.push_back(bus.submit(speed, now, bytes));
        }
        ends.extend(flying);
        ends
    }

    /// By hand: 400,000 bytes take 100 µs, and one alone 180.
    #[test]
    fn reads_that_are_in_flight_together_share_the_bus_and_not_the_latency() {
        // One at a time: every read pays for its latency.
        assert_eq!(ends(DRIVE, 4, 400_000, 1), [180, 360, 540, 720].map(|us| us * US));
        // Two: the next one's latency of 80 µs passes during the 100 µs of the one before, so the bus never idles.
        assert_eq!(ends(DRIVE, 5, 400_000, 2), [180, 280, 380, 480, 580].map(|us| us * US));
        // More in flight is no faster.
        assert_eq!(ends(DRIVE, 5, 400_000, 4), ends(DRIVE, 5, 400_000, 2));
    }

    /// By hand: 100,000 bytes take 25 µs, less than the latency. Two are submitted at 0 and end at 105 and 130. The third, submitted
    /// at 105, has its first byte at 185 and ends at 210; the fourth, submitted at 130, at 130 + 80 + 25 = 235, right behind it.
    #[test]
    fn small_reads_need_more_in_flight_to_fill_the_bus() {
        assert_eq!(ends(DRIVE, 6, 100_000, 2), [105, 130, 210, 235, 315, 340].map(|us| us * US));
        // 4 × 25 µs, and 5 µs in which the bus idles; with five in flight it never does.
        assert_eq!(ends(DRIVE, 6, 100_000, 4), [105, 130, 155, 180, 210, 235].map(|us| us * US));
        assert_eq!(ends(DRIVE, 7, 100_000, 5), [105, 130, 155, 180, 205, 230, 255].map(|us| us * US));
    }

    /// The end of the last of these reads, of which `depth` are in flight.
    fn last_end(speed: DriveSpeed, reads: &[usize], depth: usize) -> u64 {
        let (mut bus, mut flying, mut now) = (Bus::default(), VecDeque::new(), 0);
        for &bytes in reads {
            if flying.len() == depth {
                now = flying.pop_front().expect("as many as the depth");
            }
            flying.push_back(bus.submit(speed, now, bytes));
        }
        flying.back().copied().unwrap_or(now)
    }

    /// Experts whose stripes lie on several drives, each of which reads its own in chunks of 1 MiB, four in flight: together they give
    /// as many times the rate of one as there are drives, but for the end of each stripe, which is shorter than a chunk.
    #[test]
    fn drives_that_share_every_expert_give_the_sum_of_their_rates() {
        const PAGE: usize = 4096;
        let chunks = |pages: usize| {
            let (whole, rest) = (pages * PAGE / (1 << 20), pages * PAGE % (1 << 20));
            let mut chunks = vec![1 << 20; whole];
            chunks.extend((rest > 0).then_some(rest));
            chunks
        };
        let of_experts = |pages: usize| chunks(pages).repeat(200);
        // From 300 KiB, as of small experts of four bits, to 24 MiB.
        for pages in [75, 672, 1001, 6144] {
            let one = last_end(DRIVE, &of_experts(pages), 4);
            for drives in [2, 3] {
                let most = pages.div_ceil(drives);
                let together = last_end(DRIVE, &of_experts(most), 4);
                let gain = one as f64 / together as f64;
                assert!(gain >= 0.95 * drives as f64, "{pages} pages over {drives} drives: {gain:.3}");
            }
            // A drive of half the speed beside it, with half the share, gives half as much more.
            let slow = DriveSpeed { bytes_per_second: DRIVE.bytes_per_second / 2, ..DRIVE };
            let part = pages.div_ceil(3);
            let ends = [last_end(DRIVE, &of_experts(pages - part), 4), last_end(slow, &of_experts(part), 4)];
            let gain = one as f64 / *ends.iter().max().expect("two") as f64;
            assert!(gain >= 1.42, "{pages} pages, shares of two and one: {gain:.3}");
        }
    }

    #[test]
    fn a_drive_without_limits_gives_everything_at_once() {
        assert_eq!(ends(DriveSpeed::UNLIMITED, 3, 16 << 20, 2), [0, 0, 0]);
        // A bus that was busy stays so until what it had begun has ended.
        let mut bus = Bus::default();
        assert_eq!(bus.submit(DRIVE, 0, 400_000), 180 * US);
        assert_eq!(bus.submit(DriveSpeed::UNLIMITED, 100 * US, 400_000), 180 * US);
        assert_eq!(bus.submit(DriveSpeed::UNLIMITED, 200 * US, 400_000), 200 * US);
    }

    #[test]
    fn absurd_numbers_do_not_wrap() {
        let still = DriveSpeed { bytes_per_second: 0, latency: Duration::MAX };
        assert_eq!(Bus::default().submit(still, 5, usize::MAX), u64::MAX);
    }
}
