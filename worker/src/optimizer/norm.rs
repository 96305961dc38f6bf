//! The squares of the gradient's norm, by block.

use tch::{Device, Kind, Tensor};

use super::update::slice_len;
use crate::kernels::Kernels;
use crate::params::BLOCK;

/// Elements of one row of the norm: a row's sum is one output of LibTorch's reduction, added on one thread.
pub(super) const ROW: i64 = 1024;

/// Sums of squares of a flat gradient by block, f64: rows of 1024 in fp32, then the rows of a block in order.
///
/// On a CPU a row's sum is LibTorch's. On a GPU, where its reduction is cut by the number of rows too, a row is halved ten
/// times, its second half added to the first: the order is then written here, and no shape has a part in it.
pub fn block_square_sums(gradient: &Tensor) -> Vec<f64> {
    square_sums(gradient, None)
}

/// The same by a kernel where there are such, whose order is that of GPUs.
pub(super) fn square_sums(gradient: &Tensor, kernels: Option<&Kernels>) -> Vec<f64> {
    let rows = match (kernels, gradient.device()) {
        (Some(kernels), _) => kernels.square_rows(gradient),
        (None, Device::Cpu) => gradient.view([-1, ROW]).square().sum_dim_intlist(1i64, false, Kind::Float),
        (None, device) => {
            let parts = gradient.split(slice_len(device) as i64, 0);
            Tensor::cat(
                &parts.iter().map(|part| halved(&part.view([-1, ROW]).square())).collect::<Vec<_>>(),
                0,
            )
        }
    };
    let rows = Vec::<f32>::try_from(&rows).expect("a vector of f32");
    rows.chunks(BLOCK / ROW as usize).map(|block| block.iter().map(|&row| f64::from(row)).sum()).collect()
}

/// The sum of each row, `[rows, 2^k] -> [rows]`: its halves are added until one element is left.
pub(crate) fn halved(rows: &Tensor) -> Tensor {
    let width = rows.size()[1];
    if width == 1 {
        return rows.squeeze_dim(1);
    }
    halved(&(rows.narrow(1, 0, width / 2) + rows.narrow(1, width / 2, width / 2)))
}
