//! Large files of a folder, past the kernel's page cache where the file system allows it (`O_DIRECT`).
//!
//! By way of the page cache a checkpoint comes to the disk as fast as the kernel writes back, which on a busy machine was a sixth of
//! what the disk takes (docs/measured.md), it drives out what others read again, and what is read back is the cache and not the disk. Where
//! a file system does not allow it (some do not, some only for other sizes), the same calls go through the cache.
//!
//! Nothing here needs unsafe code: memory that lies as the disk wants it is cut out of a larger vector.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What places, sizes and memory are multiples of: the largest block that disks in use have.
const ALIGNMENT: usize = 4096;
/// Bytes of one read or write, with room for what stands before and after what is asked for.
const STAGED: usize = (4 << 20) + 2 * ALIGNMENT;

/// Memory that a disk can be asked to fill.
struct Staging {
    memory: Vec<u8>,
    start: usize,
}

impl Staging {
    fn new() -> Self {
        let memory = vec![0; STAGED + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + STAGED]
    }
}

fn up(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT as u64)
}

/// Opens past the cache, or through it where that is not possible.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    match options.custom_flags(OFlags::DIRECT.bits() as i32).open(path) {
        Err(cause) if cause.kind() == ErrorKind::InvalidInput => options.custom_flags(0).open(path),
        opened => opened,
    }
}

/// `transfer`, and once more through the cache when the file system does not do it past the cache after all.
fn transfer<T>(file: &File, mut transfer: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match transfer() {
        Err(cause) if cause.kind() == ErrorKind::InvalidInput => {
            fcntl_setfl(file, fcntl_getfl(file)? & !OFlags::DIRECT)?;
            transfer()
        }
        done => done,
    }
}

/// Writes `chunks`, one after the other, as the file at `path`, which appears whole and is on the disk then: its bytes and
/// its name, and the folders that had to be made. A file that was there is replaced.
pub(super) fn write(path: &Path, chunks: &[Bytes]) -> io::Result<()> {
    let folder = path.parent().ok_or(ErrorKind::InvalidInput)?;
    make_folders(folder)?;
    let (staged, file) = stage(path)?;
    let written =
        fill(&file, chunks).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&staged, path));
    if let Err(cause) = written {
        // What could not be written whole is of no use.
        let _ = std::fs::remove_file(&staged);
        return Err(cause);
    }
    File::open(folder)?.sync_all()
}

/// A new file beside `path`, named as the other writer of a folder names what is not whole: `NAME#N`.
fn stage(path: &Path) -> io::Result<(PathBuf, File)> {
    for number in 1u64.. {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("#{number}"));
        let staged = PathBuf::from(name);
        match open(OpenOptions::new().write(true).create_new(true), &staged) {
            Err(cause) if cause.kind() == ErrorKind::AlreadyExists => {}
            opened => return opened.map(|file| (staged, file)),
        }
    }
    unreachable!("there are not so many files")
}

fn fill(file: &File, chunks: &[Bytes]) -> io::Result<()> {
    let mut staging = Staging::new();
    let (mut filled, mut at) = (0, 0);
    let put = |staging: &mut Staging, filled: usize, at: &mut u64| {
        let whole = up(filled as u64) as usize;
        staging.bytes()[filled..whole].fill(0);
        transfer(file, || file.write_all_at(&staging.bytes()[..whole], *at))?;
        *at += filled as u64;
        Ok::<(), io::Error>(())
    };
    for chunk in chunks {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(STAGED - filled));
            staging.bytes()[filled..filled + now.len()].copy_from_slice(now);
            (filled, rest) = (filled + now.len(), later);
            if filled == STAGED {
                put(&mut staging, filled, &mut at)?;
                filled = 0;
            }
        }
    }
    put(&mut staging, filled, &mut at)?;
    // The last write may have reached further.
    file.set_len(at)
}

/// Makes what is missing of `folder`, so that it is there after a power cut.
fn make_folders(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().ok_or(ErrorKind::NotFound)?;
    make_folders(above)?;
    match std::fs::create_dir(folder) {
        Err(cause) if cause.kind() != ErrorKind::AlreadyExists => Err(cause),
        _ => File::open(above)?.sync_all(),
    }
}

/// A file that is read piece by piece.
pub struct Reader {
    file: File,
    size: u64,
    staging: Staging,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("file", &self.file).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Reader {
    /// Most bytes that may be asked for at a time.
    pub const MOST: u64 = (STAGED - 2 * ALIGNMENT) as u64;

    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(OpenOptions::new().read(true), path)?;
        let size = file.metadata()?.len();
        Ok(Self { file, size, staging: Staging::new() })
    }

    /// Bytes of the file when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// These bytes of the file. An error where the file ends before them. Panics when they are more than [`Reader::MOST`].
    pub fn read(&mut self, range: Range<u64>) -> io::Result<&[u8]> {
        let Range { start, end } = range;
        assert!(start <= end && end - start <= Self::MOST, "{} bytes at a time", Self::MOST);
        let first = start - start % ALIGNMENT as u64;
        let (wanted, most) = ((end - first) as usize, up(end - first) as usize);
        let (file, target) = (&self.file, &mut self.staging.bytes()[..most]);
        let mut filled = 0;
        while filled < wanted {
            // Where a read ends within a block, it was the file that ended.
            match transfer(file, || file.read_at(&mut target[filled..], first + filled as u64)) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
        Ok(&target[(start - first) as usize..wanted])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 31 % 251) as u8).collect()
    }

    #[test]
    fn a_file_of_any_size_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/file");
        for length in
            [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, STAGED - 1, STAGED, STAGED + 1, 2 * STAGED + 777]
        {
            let bytes = numbers(length);
            let chunks: Vec<Bytes> = bytes.chunks(100_003).map(Bytes::copy_from_slice).collect();
            write(&path, &chunks).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "{length} bytes");
            let mut reader = Reader::open(&path).unwrap();
            assert_eq!(reader.size(), length as u64);
            for (at, piece) in bytes.chunks(300_007).enumerate() {
                let start = at as u64 * 300_007;
                assert!(reader.read(start..start + piece.len() as u64).unwrap() == piece, "{length} bytes");
            }
            let past = reader.read(length as u64..length as u64 + 1).unwrap_err();
            assert_eq!(past.kind(), ErrorKind::UnexpectedEof, "{length} bytes");
        }
        let names: Vec<_> =
            std::fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"], "nothing is left beside it");
    }

    /// In memory there is no disk to write to past a cache.
    #[test]
    fn a_file_system_without_it_serves_as_well() {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
            return println!("SKIPPED: there is no /dev/shm");
        };
        let (path, bytes) = (folder.path().join("file"), numbers(STAGED + 5));
        write(&path, &[bytes.clone().into()]).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        assert!(reader.read(3..2_000_000).unwrap() == &bytes[3..2_000_000]);
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::create_dir_all(path.join("in the way")).unwrap();
        write(&path, &[numbers(10).into()]).unwrap_err();
        let names: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"]);
    }
}
