//! The types of `cubecl-llvm` that `cubecl-cuda` names, without a compiler behind them.

use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_server::compiler::CompilationError;
use cubecl_server::kernel::BufferIOAttr;
use nvptx::ptx_version::PtxVersion;

/// What the compiler would generate code for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LlvmTarget {
    /// NVIDIA's PTX.
    #[default]
    Nvptx,
}

/// A compiler that refuses every kernel.
#[derive(Clone, Debug, Default)]
pub struct PlironCompiler {
    /// Its target.
    pub target: LlvmTarget,
}

/// Options that the refusal does not look at.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// Architecture of another vendor.
    pub arch: Option<()>,
    /// Architecture.
    pub sm_arch: Option<SmArch>,
    /// PTX version.
    pub ptx_version: Option<PtxVersion>,
    /// Layout of the kernel's parameters.
    pub grid_constants: bool,
}

/// What a compiler would return.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PlironArtifact {
    /// PTX.
    NvptxCode(NvptxModule),
}

/// A compiled kernel.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// PTX with a closing NUL.
    pub ptx: Vec<core::ffi::c_char>,
    /// Name of the kernel.
    pub entrypoint: String,
    /// Intermediate representation, for logs.
    pub ir: String,
    /// Bytes of shared memory a launch needs.
    pub shared_memory_size: usize,
    /// What the kernel does with each buffer.
    pub io: Vec<BufferIOAttr>,
}

impl PlironCompiler {
    /// Refuses.
    pub fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this build has no LLVM code generator; cubecl-cuda's feature `cpp` must be on".into(),
            backtrace: Default::default(),
        })
    }

    /// Short name of the language.
    pub fn lang_tag(&self) -> &'static str {
        "none"
    }
}

/// Names of the original's module tree.
pub mod nvptx {
    /// PTX versions.
    pub mod ptx_version {
        /// A PTX version; none is ever chosen.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(());

        impl PtxVersion {
            /// None: nothing is emitted.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl core::fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("none")
            }
        }
    }
}

/// Names of the original's module tree.
pub mod shared {
    /// Narrowing of device features to what the original lowers.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// A target.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget {
            /// NVIDIA's PTX.
            Nvptx,
        }

        /// Only called for the LLVM backend, which is never chosen.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}
