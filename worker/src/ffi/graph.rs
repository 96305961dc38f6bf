//! CUDA graphs, as LibTorch has them (`shim.cpp`): work that is captured once and replayed.

use std::ffi::{c_int, c_void};
use std::ptr::{NonNull, null_mut};

use tch::Device;

use super::torch::{Stream, Thrown, checked, number};

/// The functions of a graph: a GPU's, or in tests those of `graph_host.cpp`.
#[derive(Debug)]
pub(super) struct Calls {
    pub pool: unsafe extern "C" fn(*mut u64) -> c_int,
    pub empty_cache: unsafe extern "C" fn() -> c_int,
    pub begin: unsafe extern "C" fn(i32, *const u64, *mut *mut c_void) -> c_int,
    pub end: unsafe extern "C" fn(i32, *mut c_void) -> c_int,
    pub replay: unsafe extern "C" fn(i32, *mut c_void) -> c_int,
    pub free: unsafe extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn anello_graph_pool(pool: *mut u64) -> c_int;
    fn anello_graph_begin(device: i32, pool: *const u64, out: *mut *mut c_void) -> c_int;
    fn anello_graph_end(device: i32, graph: *mut c_void) -> c_int;
    fn anello_graph_replay(device: i32, graph: *mut c_void) -> c_int;
    fn anello_graph_free(graph: *mut c_void);
    fn anello_empty_cache() -> c_int;
}

static OF_A_GPU: Calls = Calls {
    pool: anello_graph_pool,
    empty_cache: anello_empty_cache,
    begin: anello_graph_begin,
    end: anello_graph_end,
    replay: anello_graph_replay,
    free: anello_graph_free,
};

/// Captured work: the same kernels with the same arguments, on memory that stays where it was.
#[derive(Debug)]
pub(crate) struct Graph {
    calls: &'static Calls,
    device: i32,
    raw: NonNull<c_void>,
}

// SAFETY: CUDA's graphs may be launched and let go by any thread, one at a time; nobody else has this one. One that is being
// captured stays with its thread, since `Capture` is no part of anything that moves.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts the work into the stream that tensor operations of this thread go to.
    pub fn replay(&self) -> Result<(), Thrown> {
        // SAFETY: a live graph whose capture has ended; the memory that it uses is its pool's, or what the caller keeps.
        checked(unsafe { (self.calls.replay)(self.device, self.raw.as_ptr()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `begin`, and freed once.
        unsafe { (self.calls.free)(self.raw.as_ptr()) };
    }
}

/// Where work is captured: a stream of its own.
#[derive(Debug)]
pub(crate) struct Capturer {
    calls: &'static Calls,
    device: i32,
    stream: Stream,
}

impl Capturer {
    /// That of a GPU.
    pub fn of(device: Device) -> Result<Self, Thrown> {
        Ok(Self { calls: &OF_A_GPU, device: number(device), stream: Stream::new(device)? })
    }

    /// Captures what `work` computes: nothing of it is done before it is replayed, so that `work` may not ask for a number that is
    /// computed. It was computed once before, so that whatever is set up once is. What the graphs compute lies in memory that is
    /// theirs until the last of them is let go; they are replayed in the order in which they were captured.
    pub fn capture<T>(&self, work: impl FnOnce(&mut Capture<'_>) -> T) -> Result<(Vec<Graph>, T), Thrown> {
        // A pool of memory is none any more once its last graph is gone, so each capture has another.
        let mut pool = [0; 2];
        // SAFETY: writes two numbers; and a plain call, by which LibTorch gives back what nobody uses: what the work took when it was
        // done, and is had anew.
        unsafe {
            checked((self.calls.pool)(pool.as_mut_ptr()))?;
            checked((self.calls.empty_cache)())?;
        }
        let captured = self.stream.scope(|| {
            let mut capture = Capture { by: self, pool, open: None, done: Vec::new(), failed: None };
            capture.begin();
            let out = work(&mut capture);
            capture.end();
            match capture.failed.take() {
                Some(failed) => Err(failed),
                None => Ok((std::mem::take(&mut capture.done), out)),
            }
        });
        captured.and_then(|captured| captured)
    }
}

/// A capture under way, of one graph after the other.
#[derive(Debug)]
pub(crate) struct Capture<'a> {
    by: &'a Capturer,
    pool: [u64; 2],
    open: Option<Graph>,
    done: Vec<Graph>,
    failed: Option<Thrown>,
}

impl Capture<'_> {
    /// The graph ends here, and the next one begins.
    pub fn cut(&mut self) {
        self.end();
        self.begin();
    }

    fn begin(&mut self) {
        let Capturer { calls, device, .. } = *self.by;
        let mut raw = null_mut();
        // SAFETY: reads two numbers; `raw` is written only on success, with a graph that is ours to free.
        match checked(unsafe { (calls.begin)(device, self.pool.as_ptr(), &raw mut raw) }) {
            Ok(()) => self.open = NonNull::new(raw).map(|raw| Graph { calls, device, raw }),
            Err(cause) => self.fail(cause),
        }
    }

    /// The graph ends here, if one was begun.
    pub fn end(&mut self) {
        let Some(graph) = self.open.take() else { return };
        // SAFETY: a live graph that this thread captures.
        match checked(unsafe { (graph.calls.end)(graph.device, graph.raw.as_ptr()) }) {
            Ok(()) => self.done.push(graph),
            Err(cause) => self.fail(cause),
        }
    }

    fn fail(&mut self, cause: Thrown) {
        self.failed.get_or_insert(cause);
    }
}

impl Drop for Capture<'_> {
    /// After a panic of the work: no stream stays one that captures.
    fn drop(&mut self) {
        self.end();
    }
}

/// Graphs on a CPU.
#[cfg(test)]
pub(crate) mod host {
    use std::sync::OnceLock;

    use libloading::os::unix::Library;

    use super::*;
    use crate::ffi::emulated::compiled;

    fn library() -> &'static Library {
        static ONCE: OnceLock<Library> = OnceLock::new();
        ONCE.get_or_init(|| {
            let libtorch =
                option_env!("LIBTORCH_INCLUDE").or(option_env!("LIBTORCH")).expect("the build has one");
            let include = format!("-I{libtorch}/include");
            compiled("src/ffi/graph_host.cpp", &["-O1".to_owned(), include])
        })
    }

    /// One whose graphs are operations of LibTorch on the CPU, written down one by one.
    pub(crate) fn capturer() -> Capturer {
        static ONCE: OnceLock<Calls> = OnceLock::new();
        let calls = ONCE.get_or_init(|| {
            let library = library();
            // SAFETY: declared as in graph_host.cpp.
            unsafe {
                Calls {
                    pool: *library.get(b"anello_host_graph_pool\0").unwrap(),
                    empty_cache: *library.get(b"anello_host_graph_empty_cache\0").unwrap(),
                    begin: *library.get(b"anello_host_graph_begin\0").unwrap(),
                    end: *library.get(b"anello_host_graph_end\0").unwrap(),
                    replay: *library.get(b"anello_host_graph_replay\0").unwrap(),
                    free: *library.get(b"anello_host_graph_free\0").unwrap(),
                }
            }
        });
        let stream = Stream::current(Device::Cpu).expect("a CPU has a stream");
        Capturer { calls, device: 0, stream }
    }

    /// Graphs that this thread has replayed so far.
    pub(crate) fn replays() -> u64 {
        // SAFETY: declared as in graph_host.cpp.
        unsafe { library().get::<unsafe extern "C" fn() -> u64>(b"anello_host_graph_replays\0").unwrap()() }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    fn ones() -> Tensor {
        Tensor::ones([3], (Kind::Float, Device::Cpu))
    }

    /// What a graph of a GPU does, the stand-in of the tests does: it does nothing while it captures, reads memory anew, keeps numbers of
    /// the host, and goes on from graph to graph.
    #[test]
    fn a_graph_is_replayed_on_the_memory_that_it_was_captured_on() {
        let (mut x, sum) = (ones(), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
        let mut factor = 2.0;
        let (graphs, y) = host::capturer()
            .capture(|capture| {
                let twice = &x * factor;
                let _ = sum.shallow_clone().g_add_(&twice);
                capture.cut();
                let leaf = twice.set_requires_grad(true);
                let gradient =
                    Tensor::run_backward(&[leaf.square().sum(Kind::Float)], &[&leaf], false, false);
                gradient[0].shallow_clone()
            })
            .unwrap();
        assert_eq!((graphs.len(), Vec::<f32>::try_from(&sum).unwrap()), (2, Vec::from([0.0; 3])));
        factor += 1.0;
        assert!(factor > 2.0);
        let before = host::replays();
        for (value, added) in [(1.0, 2.0), (5.0, 12.0)] {
            let _ = x.fill_(value);
            graphs.iter().for_each(|graph| graph.replay().unwrap());
            assert_eq!(Vec::<f32>::try_from(&y).unwrap(), [4.0 * value as f32; 3]);
            assert_eq!(Vec::<f32>::try_from(&sum).unwrap(), [added; 3]);
        }
        assert_eq!(host::replays() - before, 4);
    }

    #[test]
    fn work_that_fails_while_it_is_captured_leaves_nothing_behind() {
        let capturer = host::capturer();
        // Shapes that do not fit.
        let fails = || capturer.capture(|_| ones() + Tensor::ones([2], (Kind::Float, Device::Cpu)));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(fails)).is_err());
        let (graphs, two) = capturer.capture(|_| ones() + 1.0).unwrap();
        graphs[0].replay().unwrap();
        assert!(two.equal(&(ones() * 2.0)));
        // One within another is an error, and neither is there afterwards.
        assert!(capturer.capture(|_| capturer.capture(|_| ones()).is_err()).unwrap().1);
        assert!(capturer.capture(|_| ones()).is_ok());
    }

    #[test]
    fn without_a_gpu_there_are_none() {
        if tch::Cuda::is_available() {
            eprintln!("SKIPPED: there is a GPU");
            return;
        }
        assert!(Capturer::of(Device::Cuda(0)).unwrap_err().to_string().starts_with("LibTorch: "));
        let mut id = [0; 2];
        // SAFETY: writes two numbers.
        if let Err(error) = checked(unsafe { anello_graph_pool(id.as_mut_ptr()) }) {
            // There is no CUDA half in this process either.
            assert!(
                error.to_string().contains("_ZN2at4cuda17graph_pool_handleEv of libtorch_cuda.so"),
                "{error}"
            );
        }
    }
}
