// Page copies to and from rows of eight bits as a GPU does them, bit for bit those of pages_fp8.cpp. Plain C++.
//
// A warp's work is a plane: the keys, or the values, of one head in one layer's page. It has no other warp to wait for,
// and in its registers a round of 4 KiB, which is 16 tokens of 128 elements: such a plane is read once, looked through
// for its largest magnitude, and written. A larger one is read round by round, and then again.
//
// Where every run, stride and address is a multiple of 16 bytes a lane takes 16 bytes of the page at once, and the 4 or
// 8 codes of them; else an element, byte by byte, which is slow and right.

#pragma once

#include "pages_fp8.h"
#include "pages_transfer.h"
#include "warp.h"

namespace kvx {
namespace fp8 {

// The parameters of a launch.
struct Job {
  Transfer pages;  // a piece is a plane
  kvx_page_shape shape;
  PageSizes sizes;
};

static_assert(sizeof(Job) <= 32764, "fits the parameters of a kernel");

// How pages become warps' work, for in_launches.
struct Cut {
  const kvx_page_shape& shape;
  const PageSizes& sizes;

  int64_t row_bytes(int64_t page_bytes) const { return part_bytes_of(sizes, page_bytes); }
  int64_t pieces(int64_t page_bytes) const { return page_bytes / sizes.page_bytes * shape.heads * 2; }
};

struct Plane {
  uint8_t* elements;
  uint8_t* codes;
  uint8_t* scale;
  int64_t run_stride;  // in elements
  uint32_t run;        // elements of a run
  uint32_t count;      // of all runs

  // How far from the beginning the run is that has this element, and the element in it.
  KVX_DEVICE int64_t place(uint32_t i) const { return static_cast<int64_t>(i / run) * run_stride + i % run; }
};

// Where a plane's page and its part of a row begin, and which of the planes it is.
struct Where {
  uint8_t* page;
  uint8_t* part;
  int64_t number;  // head * 2, and 1 more for values
};

KVX_DEVICE Where where(const Job& job, int64_t item) {
  const Transfer& pages = job.pages;
  const int64_t per_block = pages.first_piece[pages.num_tensors], per_page = static_cast<int64_t>(job.shape.heads) * 2;
  const int64_t block = item / per_block, in_block = item % per_block;
  const int32_t j = tensor_of(pages, in_block);
  const int64_t in_tensor = in_block - pages.first_piece[j];
  const int64_t layer = in_tensor / per_page;
  return {pages.base[j] + pages.block_ids[block] * pages.stride[j] + layer * job.sizes.page_bytes,
          pages.rows + pages.row_offsets[block] + pages.in_row[j] + layer * job.sizes.part_bytes,
          in_tensor % per_page};
}

template <Dtype dtype>
KVX_DEVICE Plane plane_at(const Job& job, const Where& at) {
  const bool keys = at.number % 2 == 0;
  const int64_t first = at.number / 2 * job.sizes.head_stride + (keys ? 0 : job.shape.k_run);
  const auto run = static_cast<uint32_t>(keys ? job.shape.k_run : job.shape.v_run);
  return {at.page + first * kElementBytes<dtype>,
          at.part + job.sizes.scale_bytes + first,
          at.part + at.number * static_cast<int64_t>(sizeof(float)),
          job.sizes.run_stride,
          run,
          run * static_cast<uint32_t>(job.shape.runs)};
}

// ---- an element at a time

template <Dtype dtype>
struct Narrow {
  static KVX_DEVICE void gather(const Plane& plane) {
    warp::Lanes<uint32_t> mosts;
    warp::each([&](int lane) {
      uint32_t most = 0;
      for (uint32_t i = lane; i < plane.count; i += warp::kLanes) {
        const uint32_t bits = magnitude_bits<dtype>(plane.elements + plane.place(i) * kElementBytes<dtype>);
        most = bits > most ? bits : most;
      }
      mosts[lane] = most;
    });
    const float scale = e4m3_scale(magnitude<dtype>(warp::most(mosts))), inverse = e4m3_inverse(scale);
    warp::each([&](int lane) {
      if (lane == 0) store(plane.scale, scale);
      for (uint32_t i = lane; i < plane.count; i += warp::kLanes) {
        const int64_t place = plane.place(i);
        plane.codes[place] = to_e4m3(read_element<dtype>(plane.elements + place * kElementBytes<dtype>) * inverse);
      }
    });
  }

  static KVX_DEVICE void scatter(const Plane& plane) {
    const float scale = tame(load<float>(plane.scale));
    warp::each([&](int lane) {
      for (uint32_t i = lane; i < plane.count; i += warp::kLanes) {
        const int64_t place = plane.place(i);
        const float x = tame(from_e4m3(plane.codes[place]) * scale);
        write_element<dtype>(plane.elements + place * kElementBytes<dtype>, x);
      }
    });
  }
};

// ---- 16 bytes of a page at a time

template <Dtype dtype>
struct Wide {
  static constexpr int kElements = sizeof(Vector) / kElementBytes<dtype>;  // of a vector
  static constexpr uint32_t kRound = kElements * kVectorsInFlight * warp::kLanes;
  static constexpr uint32_t kStep = kElements * warp::kLanes;  // from a lane's vector to its next

  // A lane's part of a round. Each index below is known when the loops are unrolled: all of it stays in registers.
  struct Vectors {
    Vector at[kVectorsInFlight];
  };

  // The codes of a vector: 4 or 8 bytes.
  struct alignas(kElements) Codes {
    uint32_t words[kElements / 4];
  };

  struct Coded {
    Codes at[kVectorsInFlight];
  };

  static KVX_DEVICE Vector* vector_at(const Plane& plane, uint32_t i) {
    return reinterpret_cast<Vector*>(plane.elements + plane.place(i) * kElementBytes<dtype>);
  }

  static KVX_DEVICE Codes* codes_at(const Plane& plane, uint32_t i) {
    return reinterpret_cast<Codes*>(plane.codes + plane.place(i));
  }

  // What lies beyond the plane is 0. Soon thrown out of the caches, but not before a second reading.
  static KVX_DEVICE void read(const Plane& plane, uint32_t first, Vectors* vectors) {
    KVX_UNROLL
    for (int k = 0; k < kVectorsInFlight; ++k) {
      const uint32_t i = first + k * kStep;
      vectors->at[k] = i < plane.count ? read_once(vector_at(plane, i)) : Vector{};
    }
  }

  static KVX_DEVICE uint32_t most_of(const Vectors& vectors) {
    uint32_t most = 0;
    KVX_UNROLL
    for (int k = 0; k < kVectorsInFlight; ++k) {
      const auto* from = reinterpret_cast<const uint8_t*>(&vectors.at[k]);
      KVX_UNROLL
      for (int n = 0; n < kElements; ++n) {
        const uint32_t bits = magnitude_bits<dtype>(from + n * kElementBytes<dtype>);
        most = bits > most ? bits : most;
      }
    }
    return most;
  }

  static KVX_DEVICE Codes encode(const Vector& vector, float inverse) {
    const auto* from = reinterpret_cast<const uint8_t*>(&vector);
    Codes codes = {};
    KVX_UNROLL
    for (int n = 0; n < kElements; ++n) {
      const uint32_t code = to_e4m3(read_element<dtype>(from + n * kElementBytes<dtype>) * inverse);
      codes.words[n / 4] |= code << n % 4 * 8;
    }
    return codes;
  }

  static KVX_DEVICE Vector decode(const Codes& codes, float scale) {
    Vector vector;
    auto* to = reinterpret_cast<uint8_t*>(&vector);
    KVX_UNROLL
    for (int n = 0; n < kElements; ++n) {
      const auto code = static_cast<uint8_t>(codes.words[n / 4] >> n % 4 * 8);
      write_element<dtype>(to + n * kElementBytes<dtype>, tame(from_e4m3(code) * scale));
    }
    return vector;
  }

  static KVX_DEVICE void gather(const Plane& plane) {
    warp::Lanes<Vectors> held;
    warp::Lanes<uint32_t> mosts;
    warp::each([&](int lane) { mosts[lane] = 0; });
    for (uint32_t round = 0; round < plane.count; round += kRound) {
      warp::each([&](int lane) {
        read(plane, round + lane * kElements, &held[lane]);
        const uint32_t most = most_of(held[lane]);
        mosts[lane] = most > mosts[lane] ? most : mosts[lane];
      });
    }
    const float scale = e4m3_scale(magnitude<dtype>(warp::most(mosts))), inverse = e4m3_inverse(scale);
    for (uint32_t round = 0; round < plane.count; round += kRound) {
      warp::each([&](int lane) {
        const uint32_t first = round + lane * kElements;
        if (plane.count > kRound) read(plane, first, &held[lane]);
        KVX_UNROLL
        for (int k = 0; k < kVectorsInFlight; ++k) {
          const uint32_t i = first + k * kStep;
          if (i < plane.count) *codes_at(plane, i) = encode(held[lane].at[k], inverse);
        }
      });
    }
    warp::each([&](int lane) {
      if (lane == 0) store_aligned(plane.scale, scale);
    });
  }

  static KVX_DEVICE void scatter(const Plane& plane) {
    const float scale = tame(load_aligned<float>(plane.scale));
    for (uint32_t round = 0; round < plane.count; round += kRound) {
      warp::each([&](int lane) {
        const uint32_t first = round + lane * kElements;
        Coded held;  // all on their way before one is used: they come over a bus
        KVX_UNROLL
        for (int k = 0; k < kVectorsInFlight; ++k) {
          if (first + k * kStep < plane.count) held.at[k] = *codes_at(plane, first + k * kStep);
        }
        KVX_UNROLL
        for (int k = 0; k < kVectorsInFlight; ++k) {
          const uint32_t i = first + k * kStep;
          if (i < plane.count) write_once(vector_at(plane, i), decode(held.at[k], scale));
        }
      });
    }
  }
};

// ---- launches

// What is stored must not hold a stranger's bytes: the warp of a page's first plane clears what lies between others.
KVX_DEVICE void clear_gaps(const Job& job, const Where& at) {
  const int64_t scales = static_cast<int64_t>(job.shape.heads) * 2 * static_cast<int64_t>(sizeof(float));
  const int64_t codes_end = job.sizes.scale_bytes + job.sizes.elements;
  warp::each([&](int lane) {
    for (int64_t i = scales + lane; i < job.sizes.scale_bytes; i += warp::kLanes) at.part[i] = 0;
    for (int64_t i = codes_end + lane; i < job.sizes.part_bytes; i += warp::kLanes) at.part[i] = 0;
  });
}

// Copies the planes of a dtype one way; stage.h says what a stage is.
template <Way way, Dtype dtype, template <Dtype> class Copier>
struct Copy {
  static constexpr int kWarps = 8;
  struct Shared {};

  static KVX_DEVICE int64_t items(const Job& job) { return num_pieces(job.pages); }

  static KVX_DEVICE void run(const Job& job, int64_t item, Shared*) {
    const Where at = where(job, item);
    const Plane plane = plane_at<dtype>(job, at);
    if (way == Way::kScatter) return Copier<dtype>::scatter(plane);
    if (at.number == 0) clear_gaps(job, at);
    Copier<dtype>::gather(plane);
  }
};

// Whether every vector of a page, and the codes of it, lie at multiples of their sizes.
inline bool is_wide(const kvx_page_shape& shape, const kvx_tensor* tensors, int32_t num_tensors,
                    const int64_t* row_offsets, int64_t num_blocks, const uint8_t* rows) {
  const int32_t elements = shape.dtype == kFloat32 ? 4 : 8;
  return shape.k_run % elements == 0 && shape.v_run % elements == 0 &&
         is_aligned(tensors, num_tensors, row_offsets, num_blocks, rows);
}

// `launch` takes a job and a stage, and returns 0 or an error code.
template <Way way, template <Dtype> class Copier, typename Launch>
int64_t launch_of_dtype(const Job& job, const Launch& launch) {
  if (job.shape.dtype == kFloat32) return launch(job, Copy<way, kFloat32, Copier>());
  if (job.shape.dtype == kFloat16) return launch(job, Copy<way, kFloat16, Copier>());
  return launch(job, Copy<way, kBfloat16, Copier>());
}

// Checks everything, then launches. Returns bytes of rows or a refusal of pages_transfer.h, never kUnaligned.
template <Way way, typename Launch>
int64_t transfer(const kvx_page_shape& shape, const kvx_tensor* tensors, int32_t num_tensors, const int64_t* block_ids,
                 const int64_t* row_offsets, int64_t num_blocks, uint8_t* rows, int64_t rows_bytes, Job* job,
                 const Launch& launch) {
  job->shape = shape, job->sizes = sizes_of(shape);
  const Cut cut = {job->shape, job->sizes};
  const int64_t violation = first_violation(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows_bytes,
                                            [&](int64_t page_bytes) { return cut.row_bytes(page_bytes); });
  if (violation != 0) return violation;
  const bool wide = is_wide(shape, tensors, num_tensors, row_offsets, num_blocks, rows);
  return in_launches(tensors, num_tensors, block_ids, row_offsets, num_blocks, rows, cut, &job->pages,
                     [&](const Transfer&) -> int64_t {
                       return wide ? launch_of_dtype<way, Wide>(*job, launch)
                                   : launch_of_dtype<way, Narrow>(*job, launch);
                     });
}

}  // namespace fp8
}  // namespace kvx
