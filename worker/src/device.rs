//! What this process computes on: its CPU, or a GPU once the CUDA half of LibTorch is loaded.
//!
//! ```text
//! the command links      libtorch_cpu.so  libc10.so                      always
//! opened at run time     libtorch_cuda.so (cuBLAS, cuDNN, NCCL, …)       when the device is one of CUDA
//! ```
//! So one build serves machines with and without GPUs. Both halves must be of one LibTorch: the CUDA half is taken from the
//! first of these that has it:
//!
//! 1. `ANELLO_TORCH_CUDA`: a `torch` package of Python, or a folder that holds `libtorch_cuda.so`, or `lib/` with it;
//! 2. the folder that this process has `libtorch_cpu.so` from, where `make cuda` puts it;
//! 3. the `torch` package of `python3` on the PATH.

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Once};

use anello_configs::ComputeDevice;
use tch::{Cuda, Device};

use crate::environment::LIBTORCH;
use crate::error::{Error, Result};
use crate::ffi::{library, torch};
use crate::kernels;

/// Names a folder with the CUDA half of LibTorch.
pub const TORCH_CUDA: &str = "ANELLO_TORCH_CUDA";
/// Names the NCCL of rings whose gradients travel by it: a `libnccl.so.2`; not set: the one of the LibTorch in use.
pub const NCCL: &str = "ANELLO_NCCL";
/// The number of a worker among those that one process starts on a machine: with `cuda` it takes the GPU of that number.
pub const SLOT: &str = "ANELLO_SLOT";
/// How cuBLAS keeps its workspace: one of these, or its results may change from call to call.
pub const WORKSPACE: (&str, &str) = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8");
/// Which of its kernels MKL computes with on a CPU. Without `STRICT` the bits of a product follow the number of threads on some
/// CPUs of Intel's, and with it on others; `AUTO` are the machine's own, and `AVX2,STRICT`, slower, those of any CPU of Intel's.
pub const MKL: (&str, &str) = ("MKL_CBWR", "AUTO,STRICT");
/// For measurements alone: with this variable a GPU computes with kernels whose bits may change from call to call. The
/// environment of the run says so.
pub const FREE_BITS: &str = "ANELLO_MEASURE_NONDETERMINISTIC";
/// The oldest driver: that of CUDA 13.0.
const DRIVER_MIN: i32 = 13_000;
const CUDA_HALF: &str = "libtorch_cuda.so";
const CPU_HALF: &str = "libtorch_cpu.so";

/// Makes `wanted` ready for this process and sets LibTorch's switches for it. May be called again.
///
/// # Errors
/// [`Error::Device`]: what is missing, where it was looked for, and what to do.
pub fn open(wanted: ComputeDevice) -> Result<Device> {
    let refused = |name: &str, value: &str| {
        let fact = format!("{name} is {}", std::env::var(name).as_deref().unwrap_or("not set"));
        missing(wanted, fact, &format!("set it to {value}: the bits depend on it"))
    };
    if !std::env::var(MKL.0).is_ok_and(|value| value.ends_with(",STRICT")) {
        return Err(refused(MKL.0, MKL.1));
    }
    let ComputeDevice::Cuda(number) = wanted else {
        keep_bits_over_threads();
        return Ok(Device::Cpu);
    };
    let found = Found::look().map_err(|fact| {
        missing(
            wanted,
            fact,
            "`make cuda` fetches it; or install torch of the same version and name it in ANELLO_TORCH_CUDA",
        )
    })?;
    found.check().map_err(|(fact, remedy)| missing(wanted, fact, &remedy))?;
    let failed = |fact: String, remedy: &str| missing(wanted, fact, remedy);
    if std::env::var(WORKSPACE.0).as_deref() != Ok(WORKSPACE.1) {
        return Err(refused(WORKSPACE.0, WORKSPACE.1));
    }
    library::load_for_all(&found.folder.join(CUDA_HALF)).map_err(|cause| {
        failed(
            cause,
            "repair that installation; what it needs lies beside it or in the nvidia packages beside torch",
        )
    })?;
    let (version, gpus) =
        library::driver().map_err(|fact| failed(fact, "run where there is a GPU, or compute on `cpu`"))?;
    if version < DRIVER_MIN {
        let fact = format!("the driver serves CUDA {}", dotted(version));
        return Err(failed(fact, &format!("update it to one for CUDA {}", dotted(DRIVER_MIN))));
    }
    let number = number.unwrap_or_else(|| slot() % (gpus.len().max(1) as u32));
    // Asked for the first time here: LibTorch remembers the answer.
    if !Cuda::is_available() || Cuda::device_count() <= i64::from(number) {
        let fact = format!("CUDA shows {} GPUs to this process, and not number {number}", gpus.len());
        return Err(failed(fact, "give a lower number, or look at CUDA_VISIBLE_DEVICES"));
    }
    let device = Device::Cuda(number as usize);
    torch::use_device(device)
        .and_then(|()| torch::set_numerics(!has_free_bits()))
        .map_err(|cause| failed(cause.to_string(), "look at the GPU with nvidia-smi"))?;
    assert_ne!(torch::is_deterministic(), has_free_bits(), "LibTorch's switches stand as they were just set");
    Ok(device)
}

/// Whether MKL does what `STRICT` asks of it, so that the bits of a product do not follow the number of threads. On CPUs that are not
/// Intel's those of small products do (docs/measured.md): there one thread computes, and more cores want more workers.
pub(crate) fn has_strict_products() -> bool {
    static STRICT: LazyLock<bool> =
        LazyLock::new(|| is_intel(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()));
    *STRICT
}

/// Has this thread compute on a CPU with one thread of LibTorch where the bits would follow from more.
fn keep_bits_over_threads() {
    static SAID: Once = Once::new();
    if !has_strict_products() && tch::get_num_threads() > 1 {
        tch::set_num_threads(1);
        SAID.call_once(|| {
            tracing::info!(
                "one thread: on this CPU the bits of a product follow their number; take more workers"
            );
        });
    }
}

/// Whether Linux says of the first CPU that it is Intel's.
fn is_intel(cpus: &str) -> bool {
    let vendor = cpus.lines().find_map(|line| line.strip_prefix("vendor_id")?.split_once(": "));
    vendor.is_some_and(|(_, vendor)| vendor.trim() == "GenuineIntel")
}

fn has_free_bits() -> bool {
    std::env::var_os(FREE_BITS).is_some()
}

/// The device that `wanted` will be, when it can be had.
pub(crate) fn named(wanted: ComputeDevice) -> Device {
    match wanted {
        ComputeDevice::Cpu => Device::Cpu,
        ComputeDevice::Cuda(Some(number)) => Device::Cuda(number as usize),
        ComputeDevice::Cuda(None) => {
            let gpus = library::driver().map_or(1, |(_, gpus)| gpus.len().max(1));
            Device::Cuda(slot() as usize % gpus)
        }
    }
}

fn slot() -> u32 {
    std::env::var(SLOT).ok().and_then(|slot| slot.parse().ok()).unwrap_or(0)
}

fn missing(wanted: ComputeDevice, fact: String, remedy: &str) -> Error {
    Error::Device { wanted: wanted.to_string(), fact, remedy: remedy.to_owned() }
}

/// As 13.0 for 13000.
fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The CUDA half of a LibTorch.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    /// That holds its libraries.
    folder: PathBuf,
    /// As its files say, `2.11.0+cu130`; absent where none does.
    version: Option<String>,
    /// Where this process has the CPU half from.
    cpu_half: Option<PathBuf>,
}

impl Found {
    /// The first place that has it; in words where it was looked for.
    fn look() -> std::result::Result<Self, String> {
        let named = std::env::var_os(TORCH_CUDA).map(PathBuf::from);
        Self::among(named, mapped(CPU_HALF), of_python)
    }

    fn among(
        named: Option<PathBuf>,
        cpu_half: Option<PathBuf>,
        of_python: impl FnOnce() -> std::result::Result<PathBuf, String>,
    ) -> std::result::Result<Self, String> {
        let try_place = |place: &Path, why: &str| {
            let folders = [place.to_owned(), place.join("lib"), place.join("torch/lib")];
            let found = folders.into_iter().find(|folder| folder.join(CUDA_HALF).is_file());
            found.ok_or_else(|| format!("not in {} ({why})", place.display()))
        };
        let beside = cpu_half.as_deref().and_then(Path::parent);
        let folder = match (named, beside) {
            // Who names a place means no other.
            (Some(place), _) => try_place(&place, TORCH_CUDA),
            (None, beside) => {
                let beside =
                    beside.map_or(Err(String::new()), |place| try_place(place, "beside libtorch_cpu.so"));
                beside.or_else(|looked| {
                    let found = of_python().and_then(|place| try_place(&place, "the torch of python3"));
                    found.map_err(|last| if looked.is_empty() { last } else { format!("{looked}; {last}") })
                })
            }
        };
        let folder = folder.map_err(|looked| format!("there is no {CUDA_HALF}: {looked}"))?;
        let version = version_of(&folder);
        Ok(Self { folder, version, cpu_half })
    }

    /// Whether both halves are of one LibTorch; else (fact, remedy).
    fn check(&self) -> std::result::Result<(), (String, String)> {
        let Self { folder, version, cpu_half } = self;
        let is_ours = |version: &str| version.split('+').next() == Some(LIBTORCH);
        if let Some(version) = version.as_deref().filter(|version| !is_ours(version)) {
            return Err((
                format!("{} is of torch {version}, and this build of {LIBTORCH}", folder.display()),
                format!("name one of torch {LIBTORCH} in {TORCH_CUDA}"),
            ));
        }
        let theirs = folder.join(CPU_HALF);
        let bytes = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.len()).ok();
        if let Some(ours) = cpu_half.as_deref()
            && bytes(ours) != bytes(&theirs)
        {
            return Err((
                format!("{} belongs to another {CPU_HALF} than {}", folder.display(), ours.display()),
                format!(
                    "start with LD_LIBRARY_PATH={}: both halves are then of one LibTorch",
                    folder.display()
                ),
            ));
        }
        Ok(())
    }
}

/// Version of the LibTorch whose libraries are in `folder`.
fn version_of(folder: &Path) -> Option<String> {
    let package = folder.parent()?;
    let read = |file: &str| std::fs::read_to_string(package.join(file)).ok();
    let of_python = || {
        let text = read("version.py")?;
        let line = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
        Some(line.trim().trim_matches('\'').to_owned())
    };
    of_python().or_else(|| read("build-version").map(|text| text.trim().to_owned()))
}

/// The file that this process has a library from.
fn mapped(library: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    paths.into_iter().find(|path| path.ends_with(library)).map(Path::to_owned)
}

/// The folder of the `torch` package of `python3`, which is not imported for that.
fn of_python() -> std::result::Result<PathBuf, String> {
    const PROGRAM: &str = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')";
    let said = std::process::Command::new("python3").args(["-c", PROGRAM]).output();
    let said = said.map_err(|cause| format!("python3 cannot be asked for its torch ({cause})"))?;
    match String::from_utf8_lossy(&said.stdout).trim() {
        "" => Err("python3 has no torch".to_owned()),
        place => Ok(PathBuf::from(place)),
    }
}

/// The kind of a GPU, as the environment of a run names it: its name and compute capability.
pub(crate) fn kind_of(device: Device) -> Option<String> {
    let Device::Cuda(number) = device else { return None };
    let (_, gpus) = library::driver().ok()?;
    let free = if has_free_bits() { ", not deterministic" } else { "" };
    gpus.get(number).map(|gpu| format!("{} (sm_{}{}{free})", gpu.name, gpu.capability.0, gpu.capability.1))
}

/// What there is on this machine for computing on GPUs, in words for `anello doctor`; whether a run may use one.
pub fn checkup() -> (bool, Vec<String>) {
    let mut lines = Vec::new();
    let halves = Found::look().and_then(|found| {
        found.check().map(|()| found).map_err(|(fact, remedy)| format!("{fact}; {remedy}"))
    });
    match &halves {
        Ok(found) => {
            let version = found.version.as_deref().unwrap_or("of unknown version");
            lines.push(format!("LibTorch for CUDA: {version}, in {}", found.folder.display()));
            lines.push(match nccl().and_then(versioned) {
                Ok((path, version)) => format!(
                    "NCCL: {}.{}.{}, {}",
                    version / 10_000,
                    version / 100 % 100,
                    version % 100,
                    path.display()
                ),
                Err(cause) => format!("NCCL: {cause}"),
            });
        }
        Err(fact) => lines.push(format!("LibTorch for CUDA: {fact}")),
    }
    if halves.is_ok() {
        lines.push(kernels::checkup());
    }
    let driver = library::driver();
    match &driver {
        Ok((version, gpus)) => {
            let fits = if *version < DRIVER_MIN { ", too old: 13.0 is needed" } else { "" };
            lines.push(format!("driver: CUDA {}{fits}", dotted(*version)));
            for (number, gpu) in gpus.iter().enumerate() {
                let (major, minor) = gpu.capability;
                lines.push(format!(
                    "cuda:{number}: {}, {} MiB, sm_{major}{minor}",
                    gpu.name,
                    gpu.bytes >> 20
                ));
            }
        }
        Err(fact) => lines.push(format!("driver: {fact}")),
    }
    let fit = halves.is_ok() && driver.is_ok_and(|(version, gpus)| version >= DRIVER_MIN && !gpus.is_empty());
    (fit, lines)
}

/// The NCCL of this process: the one that [`NCCL`] names, or that of its LibTorch. In words where there is none.
pub(crate) fn nccl() -> std::result::Result<PathBuf, String> {
    match std::env::var_os(NCCL) {
        Some(path) => Ok(PathBuf::from(path)),
        None => beside_torch("libnccl.so.2", &["../../nvidia/nccl/lib"]),
    }
}

/// An NCCL and its version.
fn versioned(path: PathBuf) -> std::result::Result<(PathBuf, i32), String> {
    library::nccl_version(&path).map(|version| (path, version))
}

/// A library of NVIDIA's that belongs to the LibTorch in use: beside its CUDA half, or in `others` from there. In words where it was
/// looked for.
pub(crate) fn beside_torch(file: &str, others: &[&str]) -> std::result::Result<PathBuf, String> {
    Found::look().and_then(|found| near(&found.folder, file, others))
}

fn near(folder: &Path, file: &str, others: &[&str]) -> std::result::Result<PathBuf, String> {
    let folders: Vec<PathBuf> =
        [folder.to_owned()].into_iter().chain(others.iter().map(|other| folder.join(other))).collect();
    let path = folders.iter().map(|folder| folder.join(file)).find(|path| path.is_file());
    path.ok_or_else(|| {
        let looked: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
        format!("there is no {file} in {}", looked.join(" or "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(version: &str, cpu_bytes: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let lib = dir.path().join("torch/lib");
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::write(lib.join(CUDA_HALF), "").unwrap();
        std::fs::write(lib.join(CPU_HALF), vec![0; cpu_bytes]).unwrap();
        std::fs::write(dir.path().join("torch/version.py"), format!("x = 1\n__version__ = '{version}'\n"))
            .unwrap();
        dir
    }

    fn nowhere() -> std::result::Result<PathBuf, String> {
        Err("python3 has no torch".to_owned())
    }

    #[test]
    fn the_cuda_half_is_looked_for_in_order() {
        let (a, b) = (package("2.11.0+cu130", 3), package("2.11.0+cu130", 3));
        let cpu_half = Some(b.path().join("torch/lib").join(CPU_HALF));
        let lib = |dir: &tempfile::TempDir| dir.path().join("torch/lib");
        for place in [a.path().to_owned(), a.path().join("torch"), lib(&a)] {
            let found = Found::among(Some(place), cpu_half.clone(), nowhere).unwrap();
            assert_eq!((&found.folder, found.version.as_deref()), (&lib(&a), Some("2.11.0+cu130")));
            assert_eq!(found.check(), Ok(()));
        }
        assert_eq!(Found::among(None, cpu_half, nowhere).unwrap().folder, lib(&b));
        let of_python = Found::among(None, None, || Ok(a.path().join("torch"))).unwrap();
        assert_eq!(of_python.folder, lib(&a));
    }

    #[test]
    fn a_library_of_nvidia_is_looked_for_beside_the_cuda_half_and_in_its_package() {
        let dir = package("2.11.0+cu130", 3);
        let lib = dir.path().join("torch/lib");
        let others = lib.join("../../nvidia/cu13/lib");
        let look = || near(&lib, "libnvrtc.so.13", &["../../nvidia/cu13/lib"]);
        let expected = format!("there is no libnvrtc.so.13 in {} or {}", lib.display(), others.display());
        assert_eq!(look(), Err(expected));
        for folder in [others, lib.clone()] {
            std::fs::create_dir_all(dir.path().join("nvidia/cu13/lib")).unwrap();
            std::fs::write(folder.join("libnvrtc.so.13"), "").unwrap();
            assert_eq!(look(), Ok(folder.join("libnvrtc.so.13")));
        }
    }

    #[test]
    fn what_is_not_found_says_where_it_was_looked_for() {
        let empty = tempfile::tempdir().unwrap();
        let cpu_half = Some(empty.path().join(CPU_HALF));
        let place = empty.path().display();
        let error = Found::among(None, cpu_half.clone(), nowhere).unwrap_err();
        let expected = format!(
            "there is no libtorch_cuda.so: not in {place} (beside libtorch_cpu.so); python3 has no torch"
        );
        assert_eq!(error, expected);
        let named =
            Found::among(Some(empty.path().to_owned()), cpu_half, || unreachable!("a place is named"));
        assert_eq!(
            named.unwrap_err(),
            format!("there is no libtorch_cuda.so: not in {place} (ANELLO_TORCH_CUDA)")
        );
    }

    #[test]
    fn halves_of_two_libtorches_are_refused() {
        let other = package("2.10.0+cu128", 3);
        let found = Found::among(Some(other.path().to_owned()), None, nowhere).unwrap();
        let (fact, remedy) = found.check().unwrap_err();
        assert!(fact.ends_with("is of torch 2.10.0+cu128, and this build of 2.11.0"), "{fact}");
        assert_eq!(remedy, "name one of torch 2.11.0 in ANELLO_TORCH_CUDA");
        let (a, b) = (package("2.11.0+cu130", 3), package("2.11.0+cu126", 4));
        let cpu_half = Some(a.path().join("torch/lib").join(CPU_HALF));
        let (fact, remedy) =
            Found::among(Some(b.path().to_owned()), cpu_half, nowhere).unwrap().check().unwrap_err();
        assert!(fact.contains("belongs to another libtorch_cpu.so than"), "{fact}");
        assert!(remedy.starts_with("start with LD_LIBRARY_PATH="), "{remedy}");
    }

    #[test]
    fn more_threads_are_for_cpus_whose_products_do_not_follow_them() {
        let cpu = |vendor: &str| format!("processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: one\n");
        assert!(is_intel(&cpu("GenuineIntel")));
        assert!(!is_intel(&cpu("AuthenticAMD")) && !is_intel(""));
        tch::set_num_threads(3);
        open(ComputeDevice::Cpu).unwrap();
        assert_eq!(tch::get_num_threads(), if has_strict_products() { 3 } else { 1 });
        tch::set_num_threads(1);
    }

    #[test]
    fn this_process_has_its_cpu_half_from_a_file() {
        assert!(tch::get_num_threads() > 0);
        let path = mapped(CPU_HALF).unwrap();
        assert!(path.is_file(), "{}", path.display());
        assert_eq!(version_of(path.parent().unwrap()).as_deref().map(|v| v.starts_with("2.")), Some(true));
    }

    #[test]
    fn a_checkup_tells_of_all_parts() {
        let (_, lines) = checkup();
        let text = lines.join("\n");
        assert!(text.contains("LibTorch for CUDA: ") && text.contains("driver: "), "{text}");
    }

    /// With the CUDA half and without a GPU (in CI only where ANELLO_TORCH_CUDA is set): it is loaded, and the error is that
    /// there is no driver.
    #[test]
    fn without_a_gpu_the_error_says_so() {
        let Ok(_) = std::env::var(TORCH_CUDA) else {
            eprintln!("SKIPPED: {TORCH_CUDA} names no CUDA half of LibTorch");
            return;
        };
        match open(ComputeDevice::Cuda(None)) {
            Ok(device) => assert!(device.is_cuda()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("driver of NVIDIA") || text.contains(WORKSPACE.0), "{text}");
            }
        }
    }
}
