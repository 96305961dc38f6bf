//! The frames on a connection: a header of 40 bytes, then the payload. Pure over `Read` and `Write`.
//!
//! ```text
//!   0 magic "ANR1"   4 kind   5 zero   6 part (u16)   8 generation (u64)   16 step (u64)
//!  24 block (u32)   28 payload bytes (u32)   32 checksum of the payload   36 checksum of the 36 bytes before
//! ```
//! Integers are little-endian; checksums are CRC-32 (IEEE). The header's own checksum comes first, so that no length
//! is believed before it was checked. On a data connection both sides know which frame is next: the header is compared
//! with what is due, and the payload goes straight to its place. On a control connection frames carry up to
//! [`MESSAGE_BYTES_MAX`] bytes, allocated when the header was right.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Generation, MESSAGE_BYTES_MAX, Step};

const MAGIC: [u8; 4] = *b"ANR1";

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = size_of::<Header>();

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A block of a partial sum, to its owner.
    Part = 1,
    /// A block from its owner.
    Gathered = 2,
    /// A message that rides with a reduction.
    ReduceMessage = 3,
    /// A message of an exchange.
    ExchangeMessage = 4,
    /// Last words; their step is the number of the operation.
    Farewell = 5,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    magic: [u8; 4],
    kind: u8,
    zero: u8,
    part: U16,
    generation: U64,
    step: U64,
    block: U32,
    length: U32,
    payload_checksum: U32,
    checksum: U32,
}

/// What a header says beside its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub kind: Kind,
    pub generation: Generation,
    pub step: Step,
    pub block: u32,
    pub part: u16,
}

/// Why bytes are not the frame that was due.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The connection failed, or was closed.
    Io(std::io::Error),
    /// The header's checksum or magic is wrong.
    Header,
    /// The payload's checksum is wrong.
    Payload,
    /// A sound header of another frame.
    Unexpected(String),
}

/// How far an operation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The frame is through.
    Done,
    /// The connection has no more bytes, or takes none, for now.
    Blocked,
}

impl Header {
    pub fn new(address: Address, length: usize, payload_checksum: u32) -> Self {
        let mut header = Self {
            magic: MAGIC,
            kind: address.kind as u8,
            zero: 0,
            part: address.part.into(),
            generation: address.generation.0.into(),
            step: address.step.0.into(),
            block: address.block.into(),
            length: u32::try_from(length).expect("payloads are bounded by 16 MiB").into(),
            payload_checksum: payload_checksum.into(),
            checksum: 0.into(),
        };
        header.checksum = header.own_checksum().into();
        header
    }

    fn own_checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..HEADER_BYTES - 4])
    }

    /// The header in `bytes`, when its checksum is right.
    pub fn read(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Fault> {
        let header = zerocopy::transmute!(*bytes);
        let header: Self = header;
        if header.magic != MAGIC || header.checksum.get() != header.own_checksum() {
            return Err(Fault::Header);
        }
        Ok(header)
    }

    pub fn address(&self) -> Result<Address, Fault> {
        let kind = match self.kind {
            1 => Kind::Part,
            2 => Kind::Gathered,
            3 => Kind::ReduceMessage,
            4 => Kind::ExchangeMessage,
            5 => Kind::Farewell,
            other => return Err(Fault::Unexpected(format!("a frame of unknown kind {other}"))),
        };
        Ok(Address {
            kind,
            generation: Generation(self.generation.get()),
            step: Step(self.step.get()),
            block: self.block.get(),
            part: self.part.get(),
        })
    }

    /// What of this header is not as `due` with `length` bytes.
    fn expect(&self, due: Address, length: usize) -> Result<(), Fault> {
        let found = self.address()?;
        if found == due && self.length.get() as usize == length {
            return Ok(());
        }
        let say = |a: Address, length: usize| {
            format!(
                "{:?} of {}, {}, block {} part {} ({length} bytes)",
                a.kind, a.generation, a.step, a.block, a.part
            )
        };
        Err(Fault::Unexpected(format!(
            "{} came where {} was due",
            say(found, self.length.get() as usize),
            say(due, length)
        )))
    }
}

/// Reads into all of `place` from `*at` on, until it is full or the connection has no more.
fn fill(io: &mut impl Read, place: &mut [u8], at: &mut usize) -> Result<Progress, Fault> {
    while *at < place.len() {
        match io.read(&mut place[*at..]) {
            Ok(0) => return Err(Fault::Io(ErrorKind::UnexpectedEof.into())),
            Ok(read) => *at += read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Progress::Blocked),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Fault::Io(error)),
        }
    }
    Ok(Progress::Done)
}

/// Receives the frames of a data connection, each into a place that the caller knows.
#[derive(Debug)]
pub(crate) struct Receiver {
    header: [u8; HEADER_BYTES],
    at: usize,
    checksum: crc32fast::Hasher,
}

impl Default for Receiver {
    fn default() -> Self {
        Self { header: [0; HEADER_BYTES], at: 0, checksum: crc32fast::Hasher::new() }
    }
}

impl Receiver {
    /// Goes on with the frame that is `due`, its payload into `place`. After `Done` the next call begins the next frame;
    /// after `Blocked` it must be called with the same arguments.
    pub fn receive(&mut self, io: &mut impl Read, due: Address, place: &mut [u8]) -> Result<Progress, Fault> {
        while self.at < HEADER_BYTES {
            // What follows the header goes to its place at once: a place may hold anything until its frame is through.
            let both = &mut [IoSliceMut::new(&mut self.header[self.at..]), IoSliceMut::new(place)];
            match io.read_vectored(both) {
                Ok(0) => return Err(Fault::Io(ErrorKind::UnexpectedEof.into())),
                Ok(read) => self.at += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Progress::Blocked),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Fault::Io(error)),
            }
            if self.at >= HEADER_BYTES {
                Header::read(&self.header)?.expect(due, place.len())?;
                self.checksum.reset();
                self.checksum.update(&place[..self.at - HEADER_BYTES]);
            }
        }
        let (start, mut at) = (self.at - HEADER_BYTES, self.at - HEADER_BYTES);
        let progress = fill(io, place, &mut at)?;
        // While the bytes are in the cache.
        self.checksum.update(&place[start..at]);
        self.at = at + HEADER_BYTES;
        if progress == Progress::Done {
            let header = Header::read(&self.header)?;
            if self.checksum.clone().finalize() != header.payload_checksum.get() {
                return Err(Fault::Payload);
            }
            self.at = 0;
        }
        Ok(progress)
    }
}

/// Sends frames whose payload stays where it is.
#[derive(Debug)]
pub(crate) struct Sender {
    header: [u8; HEADER_BYTES],
    at: usize,
    begun: bool,
    /// For tests: the next payload is to change on its way, and one that does.
    flips: bool,
    flipped: Option<Vec<u8>>,
}

impl Default for Sender {
    fn default() -> Self {
        Self { header: [0; HEADER_BYTES], at: 0, begun: false, flips: false, flipped: None }
    }
}

impl Sender {
    /// For tests: one bit of the next payload flips after its checksum was taken.
    pub fn flip_a_bit(&mut self) {
        self.flips = true;
    }

    /// Goes on with a frame. `checksum` is asked for once, when the frame begins; after `Blocked` the call must be
    /// repeated with the same address and payload.
    pub fn send(
        &mut self,
        io: &mut impl Write,
        address: Address,
        payload: &[u8],
        checksum: impl FnOnce() -> u32,
    ) -> std::io::Result<Progress> {
        if !self.begun {
            self.header = zerocopy::transmute!(Header::new(address, payload.len(), checksum()));
            (self.begun, self.at) = (true, 0);
            self.flipped = std::mem::take(&mut self.flips).then(|| {
                let mut flipped = payload.to_vec();
                flipped[payload.len() / 2] ^= 1;
                flipped
            });
        }
        let payload = self.flipped.as_deref().unwrap_or(payload);
        while self.at < HEADER_BYTES + payload.len() {
            let written = if self.at < HEADER_BYTES {
                io.write_vectored(&[IoSlice::new(&self.header[self.at..]), IoSlice::new(payload)])
            } else {
                io.write(&payload[self.at - HEADER_BYTES..])
            };
            match written {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => self.at += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Progress::Blocked),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.begun = false;
        Ok(Progress::Done)
    }
}

/// A frame of a control connection.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Message {
    pub address: Address,
    pub bytes: Vec<u8>,
}

/// Receives the frames of a control connection.
#[derive(Debug)]
pub(crate) struct MessageReceiver {
    header: [u8; HEADER_BYTES],
    header_at: usize,
    bytes: Vec<u8>,
    at: usize,
}

impl Default for MessageReceiver {
    fn default() -> Self {
        Self { header: [0; HEADER_BYTES], header_at: 0, bytes: Vec::new(), at: 0 }
    }
}

impl MessageReceiver {
    /// The next frame, when all of it is there. Allocates at most [`MESSAGE_BYTES_MAX`] bytes.
    pub fn receive(&mut self, io: &mut impl Read) -> Result<Option<Message>, Fault> {
        if self.header_at < HEADER_BYTES {
            if fill(io, &mut self.header, &mut self.header_at)? == Progress::Blocked {
                return Ok(None);
            }
            let length = Header::read(&self.header)?.length.get() as usize;
            if length > MESSAGE_BYTES_MAX {
                return Err(Fault::Unexpected(format!(
                    "a message of {length} bytes; {MESSAGE_BYTES_MAX} are allowed"
                )));
            }
            self.bytes = vec![0; length];
            self.at = 0;
        }
        if fill(io, &mut self.bytes, &mut self.at)? == Progress::Blocked {
            return Ok(None);
        }
        let header = Header::read(&self.header)?;
        if crc32fast::hash(&self.bytes) != header.payload_checksum.get() {
            return Err(Fault::Payload);
        }
        self.header_at = 0;
        Ok(Some(Message { address: header.address()?, bytes: std::mem::take(&mut self.bytes) }))
    }
}

/// A whole frame as bytes, for a control connection.
pub(crate) fn message(address: Address, bytes: &[u8]) -> Vec<u8> {
    let header = Header::new(address, bytes.len(), crc32fast::hash(bytes));
    [header.as_bytes(), bytes].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ADDRESS: Address =
        Address { kind: Kind::Part, generation: Generation(3), step: Step(9), block: 7, part: 1 };

    /// A connection that gives and takes `size` bytes at a time, and blocks between.
    struct Slow {
        bytes: std::collections::VecDeque<u8>,
        size: usize,
        blocked: bool,
    }

    impl Slow {
        fn new(bytes: Vec<u8>, size: usize) -> Self {
            Self { bytes: bytes.into(), size, blocked: false }
        }

        fn turn(&mut self) -> std::io::Result<()> {
            self.blocked = !self.blocked;
            if self.blocked { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
        }
    }

    impl Read for Slow {
        fn read(&mut self, place: &mut [u8]) -> std::io::Result<usize> {
            self.turn()?;
            let size = self.size.min(place.len());
            self.bytes.read(&mut place[..size])
        }
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.turn()?;
            let size = self.size.min(bytes.len());
            self.bytes.extend(&bytes[..size]);
            Ok(size)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn receive(bytes: Vec<u8>, length: usize) -> (Result<(), Fault>, Vec<u8>) {
        let (mut io, mut receiver) = (Slow::new(bytes, 13), Receiver::default());
        let mut place = vec![0; length];
        loop {
            match receiver.receive(&mut io, ADDRESS, &mut place) {
                Ok(Progress::Blocked) => {}
                Ok(Progress::Done) => return (Ok(()), place),
                Err(fault) => return (Err(fault), place),
            }
        }
    }

    fn payload(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 31) as u8).collect()
    }

    #[test]
    fn a_header_is_forty_bytes_in_a_fixed_order() {
        let bytes = message(ADDRESS, b"abc");
        assert_eq!(HEADER_BYTES, 40);
        assert_eq!(&bytes[..8], b"ANR1\x01\0\x01\0");
        assert_eq!(bytes[8..16], 3u64.to_le_bytes());
        assert_eq!(bytes[16..24], 9u64.to_le_bytes());
        assert_eq!(bytes[24..32], [7, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[32..36], crc32fast::hash(b"abc").to_le_bytes());
    }

    #[test]
    fn another_frame_than_the_one_due_is_told_in_words() {
        let other = Address { step: Step(8), ..ADDRESS };
        let (Err(Fault::Unexpected(fact)), _) = receive(message(other, &payload(4)), 4) else {
            panic!("taken for the frame that was due")
        };
        assert_eq!(
            fact,
            "Part of generation 3, step 8, block 7 part 1 (4 bytes) came where Part of generation 3, step 9, \
             block 7 part 1 (4 bytes) was due"
        );
    }

    proptest! {
        #[test]
        fn frames_come_through_in_any_pieces(length in 0usize..300, size in 1usize..97) {
            let (mut io, mut sender) = (Slow::new(Vec::new(), size), Sender::default());
            let payload = payload(length);
            for _ in 0..2 {
                let mut asked = 0;
                loop {
                    let checksum = || { asked += 1; crc32fast::hash(&payload) };
                    if sender.send(&mut io, ADDRESS, &payload, checksum).unwrap() == Progress::Done { break; }
                }
                prop_assert_eq!(asked, 1);
            }
            let bytes: Vec<u8> = io.bytes.into();
            prop_assert_eq!(&bytes, &[message(ADDRESS, &payload), message(ADDRESS, &payload)].concat());
            let (result, place) = receive(bytes, length);
            prop_assert!(result.is_ok());
            prop_assert_eq!(place, payload);
        }

        #[test]
        fn a_flipped_bit_is_found(length in 0usize..200, at in 0usize..240, bit in 0u8..8) {
            let mut bytes = message(ADDRESS, &payload(length));
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let (result, _) = receive(bytes.clone(), length);
            match result {
                Err(Fault::Header) => prop_assert!(at < HEADER_BYTES),
                Err(Fault::Payload) => prop_assert!(at >= HEADER_BYTES),
                other => prop_assert!(false, "{:?}", other),
            }
            prop_assert!(MessageReceiver::default().receive(&mut bytes.as_slice()).is_err());
        }

        /// Any bytes at all: no panic, and never more memory than the bound.
        #[test]
        fn any_bytes_are_refused_or_read(
            bytes in prop::collection::vec(any::<u8>(), 0..200), length in any::<u32>(), sound in any::<bool>()
        ) {
            let mut all = bytes.clone();
            if sound {
                // A sound header with any length in front.
                let mut header = Header::new(ADDRESS, 0, 0);
                header.length = length.into();
                header.checksum = header.own_checksum().into();
                all = [header.as_bytes(), &bytes].concat();
            }
            let mut receiver = MessageReceiver::default();
            let mut io = all.as_slice();
            while let Ok(Some(message)) = receiver.receive(&mut io) {
                prop_assert!(message.bytes.len() <= MESSAGE_BYTES_MAX);
            }
            prop_assert!(receiver.bytes.capacity() <= MESSAGE_BYTES_MAX);
            let _ = receive(all, 16);
        }
    }
}
