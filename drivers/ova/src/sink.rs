//! [`PackageSink`], a new package: descriptor and manifest in room that is reserved for them, and one disk
//! after the other, each made by a sink of its own format. Lengths and digests are filled in at the end.
//!
//! The sink of a disk appends to a framed output. Its writes are moved behind what is already in the archive,
//! and digested in this order.

use std::fmt;
use std::sync::Mutex;

use imgtool_core::machine::Machine;
use imgtool_core::sync::lock;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Output, OutputId, Prepared, Result, SinkDevice,
    SinkPiece, WriteList,
};
use imgtool_machine::ovf::{self, PackagedDisk};

use crate::manifest::Hasher;
use crate::options::OvaOptions;
use crate::tar::{BLOCK, write};

/// Length in bytes of the end mark.
const END_MARK: usize = 2 * BLOCK;

/// Length of a file with the most digits, for the room of the descriptor.
const LONGEST: u64 = i64::MAX as u64;

/// A new package.
pub(crate) struct NewPackage {
    /// Name of the machine's files, without extensions.
    pub(crate) name: String,
    pub(crate) machine: Machine,
    /// Address of the specification of the disks' format.
    pub(crate) format: &'static str,
    pub(crate) options: OvaOptions,
    pub(crate) members: Vec<NewMember>,
}

/// A disk of a new package.
pub(crate) struct NewMember {
    /// Name of its file.
    pub(crate) file: String,
    /// Name of its device.
    pub(crate) device: String,
    /// Virtual size in bytes, as the image states it.
    pub(crate) capacity: u64,
    pub(crate) sink: Box<dyn ImageSink>,
}

/// A file of the package that is complete.
#[derive(Debug, Clone)]
struct Written {
    /// Position of its content.
    start: u64,
    len: u64,
    digest: Option<Vec<u8>>,
}

/// A disk that is being written.
#[derive(Debug)]
struct Open {
    start: u64,
    len: u64,
    hasher: Option<Hasher>,
}

/// Progress of the placement.
#[derive(Debug)]
struct State {
    /// Disks that are complete.
    written: Vec<Written>,
    /// The disk after them, if it was begun.
    open: Option<Open>,
    /// Position of the next header.
    next: u64,
}

/// A package being written.
pub(crate) struct PackageSink {
    outputs: [Output; 1],
    package: NewPackage,
    /// Length in bytes of the room for the descriptor.
    descriptor_len: usize,
    state: Mutex<State>,
    notes: Mutex<Vec<String>>,
}

impl fmt::Debug for PackageSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackageSink").field("name", &self.package.name).finish_non_exhaustive()
    }
}

/// Writes bytes at a position of the package.
type Write<'w> = &'w mut dyn FnMut(u64, Vec<u8>) -> Result<()>;

impl NewPackage {
    fn descriptor_name(&self) -> String {
        format!("{}.ovf", self.name)
    }

    /// Returns the descriptor with the lengths of the files, and what it has no place for.
    fn descriptor(&self, len: impl Fn(usize) -> u64) -> imgtool_machine::Printed {
        let mut disks = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            disks.push(PackagedDisk {
                device: &member.device,
                href: &member.file,
                len: Some(len(index)),
                capacity: member.capacity,
                format: self.format,
            });
        }
        ovf::print(&self.machine, &disks)
    }

    /// Returns the manifest of files with these names and digests.
    fn manifest<'f>(&self, files: impl Iterator<Item = (&'f str, &'f [u8])>) -> String {
        let algorithm = self.options.manifest.map_or("", crate::manifest::Algorithm::name);
        let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        // VMware wants exactly this form.
        files.map(|(name, digest)| format!("{algorithm}({name})= {}\n", hex(digest))).collect()
    }

    /// Returns the length of the manifest in bytes; `None` without one.
    fn manifest_len(&self) -> Option<usize> {
        let digest = vec![0; self.options.manifest?.len()];
        let name = self.descriptor_name();
        let names = std::iter::once(&*name).chain(self.members.iter().map(|member| &*member.file));
        Some(self.manifest(names.map(|name| (name, &digest[..]))).len())
    }

    /// Returns the position behind the descriptor and the manifest, where the disks begin.
    fn disks_start(&self, descriptor_len: usize) -> u64 {
        let member = |len: usize| (BLOCK + len.next_multiple_of(BLOCK)) as u64;
        member(descriptor_len) + self.manifest_len().map_or(0, member)
    }
}

impl PackageSink {
    /// Creates a sink that writes to `output`.
    pub(crate) fn new(output: Output, package: NewPackage) -> Result<Self> {
        let printed = package.descriptor(|_| LONGEST);
        let descriptor_len = printed.text.len();
        // The names are known to fit, before anything is written.
        write::header(&package.descriptor_name(), 0, 0)?;
        package.members.iter().try_for_each(|member| write::header(&member.file, 0, 0).map(drop))?;
        let next = package.disks_start(descriptor_len);
        let state = Mutex::new(State { written: Vec::new(), open: None, next });
        let notes = Mutex::new(printed.lost);
        Ok(Self { outputs: [output], package, descriptor_len, state, notes })
    }

    /// Returns the sink of a device.
    fn member(&self, device: SinkDevice) -> Result<&NewMember> {
        let member = self.package.members.get(device.index());
        member.ok_or_else(|| Error::out_of_bounds(format!("the package has no device {device}")))
    }

    /// Begins the disks up to the one with this index, and ends those before it.
    fn advance(&self, state: &mut State, index: usize, write: Write<'_>) -> Result<()> {
        while state.written.len() < index {
            self.begin_disk(state, write)?;
            self.end_disk(state, write)?;
        }
        if state.written.len() > index {
            return Err(Error::out_of_order("the disks of a package must come one after the other")
                .hint("save the source to a file, and convert from there"));
        }
        self.begin_disk(state, write)
    }

    /// Begins the next disk, unless it was begun.
    fn begin_disk(&self, state: &mut State, write: Write<'_>) -> Result<()> {
        let Some(member) = self.package.members.get(state.written.len()) else { return Ok(()) };
        if state.open.is_some() {
            return Ok(());
        }
        let hasher = self.package.options.manifest.map(crate::manifest::Algorithm::hasher);
        let mut open = Open { start: state.next + BLOCK as u64, len: 0, hasher };
        open.append(member.sink.begin()?, write)?;
        state.open = Some(open);
        Ok(())
    }

    /// Ends the disk that was begun.
    fn end_disk(&self, state: &mut State, write: Write<'_>) -> Result<()> {
        let (Some(member), Some(mut open)) =
            (self.package.members.get(state.written.len()), state.open.take())
        else {
            return Ok(());
        };
        open.append(member.sink.end()?, write)?;
        member.sink.finish()?;
        let Open { start, len, hasher } = open;
        state.next = start + len.next_multiple_of(BLOCK as u64);
        state.written.push(Written { start, len, digest: hasher.map(Hasher::finish) });
        Ok(())
    }

    /// Writes a file with its header at `at`. Returns the position behind it.
    fn write_file(&self, name: &str, content: &[u8], at: u64) -> Result<u64> {
        let header = write::header(name, content.len() as u64, self.package.options.mtime)?;
        self.outputs[0].write_at(&[&header[..], content].concat(), at)?;
        Ok(at + (BLOCK + content.len().next_multiple_of(BLOCK)) as u64)
    }
}

impl Open {
    fn append(&mut self, bytes: Vec<u8>, write: Write<'_>) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&bytes);
        }
        let at = self.start + self.len;
        self.len += bytes.len() as u64;
        write(at, bytes)
    }

    /// Digests zeros.
    fn digest_zeros(&mut self, mut len: u64) {
        const ZEROS: [u8; 4096] = [0; 4096];
        let Some(hasher) = &mut self.hasher else { return };
        while len > 0 {
            let part = len.min(ZEROS.len() as u64);
            // At most a page, so it fits.
            hasher.update(&ZEROS[..part as usize]);
            len -= part;
        }
    }
}

impl Consumer for PackageSink {
    fn geometry(&self, device: SinkDevice) -> Geometry {
        let own = Geometry {
            granule: BLOCK as u64,
            granule_required: true,
            piece_len: 1 << 20,
            max_zero_len: u64::MAX,
            ordered: true,
        };
        let member = self.member(device).map(|member| member.sink.geometry(SinkDevice(0)));
        member.map_or(own, |geometry| Geometry { ordered: true, ..geometry })
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let device = piece.device;
        let prepared = self.member(device)?.sink.prepare(piece.routed(SinkDevice(0)), pool)?;
        Ok(Prepared { device, ..prepared })
    }

    fn worker_memory(&self) -> u64 {
        self.package.members.iter().map(|member| member.sink.worker_memory()).max().unwrap_or(0)
    }
}

impl ImageSink for PackageSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn in_guest_order(&self) -> bool {
        true
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let member = self.member(prepared.device)?;
        let state = &mut *lock(&self.state);
        let mut push = |at: u64, bytes: Vec<u8>| {
            writes.push(OutputId::MAIN, at, Bytes::Owned(bytes));
            Ok(())
        };
        self.advance(state, prepared.device.index(), &mut push)?;
        let Some(open) = &mut state.open else { return Ok(()) };
        let mut own = WriteList::default();
        member.sink.place(prepared, &mut own).map_err(|e| e.device(&*member.device))?;
        for write in own.into_writes() {
            if write.file_offset != open.len {
                return Err(Error::out_of_order("a disk in a package must be written in order"));
            }
            match (&mut open.hasher, prepared.bytes(&write.bytes)) {
                (Some(hasher), Some(bytes)) => hasher.update(bytes),
                (Some(_), None) => open.digest_zeros(write.bytes.len()),
                (None, _) => {}
            }
            open.len += write.bytes.len();
            writes.push(OutputId::MAIN, open.start + write.file_offset, write.bytes);
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let state = &mut *lock(&self.state);
        let mut write = |at: u64, bytes: Vec<u8>| self.outputs[0].write_at(&bytes, at);
        while state.written.len() < self.package.members.len() {
            self.begin_disk(state, &mut write)?;
            self.end_disk(state, &mut write)?;
        }
        let printed = self.package.descriptor(|index| state.written.get(index).map_or(0, |file| file.len));
        let descriptor = ovf::padded(&printed.text, self.descriptor_len)
            .ok_or_else(|| Error::limit("the descriptor is longer than the room for it"))?;
        let name = self.package.descriptor_name();
        let mut at = self.write_file(&name, descriptor.as_bytes(), 0)?;
        if let Some(algorithm) = self.package.options.manifest {
            let mut hasher = algorithm.hasher();
            hasher.update(descriptor.as_bytes());
            let digest = hasher.finish();
            let disks = self.package.members.iter().zip(&state.written);
            let disks =
                disks.map(|(member, file)| (&*member.file, file.digest.as_deref().unwrap_or_default()));
            let text = self.package.manifest(std::iter::once((&*name, &*digest)).chain(disks));
            at = self.write_file(&format!("{}.mf", self.package.name), text.as_bytes(), at)?;
        }
        for (member, file) in self.package.members.iter().zip(&state.written) {
            let header = write::header(&member.file, file.len, self.package.options.mtime)?;
            debug_assert_eq!(at + BLOCK as u64, file.start, "the room is filled");
            self.outputs[0].write_at(&header, file.start - BLOCK as u64)?;
            at = file.start + file.len.next_multiple_of(BLOCK as u64);
        }
        self.outputs[0].write_at(&[0; END_MARK], at)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = lock(&self.notes).clone();
        for member in &self.package.members {
            notes.extend(member.sink.notes().into_iter().map(|note| format!("{}: {note}", member.device)));
        }
        notes
    }
}
