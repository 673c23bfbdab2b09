package bundle_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"github.com/slotota/ota"
	"io"
	"os"
	"testing"

	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// benchImage is the file that the environment variable OTA_BENCH_FILE names.
func benchImage(b *testing.B) *image {
	path := os.Getenv("OTA_BENCH_FILE")
	if path == "" {
		b.Skip("OTA_BENCH_FILE names no file (see bench/create)")
	}
	f, err := os.Open(path)
	require.NoError(b, err)
	b.Cleanup(func() { _ = f.Close() })
	info, err := f.Stat()
	require.NoError(b, err)
	return &image{f, info.Size()}
}

type image struct {
	*os.File
	size int64
}

func (i *image) Size() int64 { return i.size }

// create writes a bundle of f to a file, and returns what the part is stored in.
func create(b *testing.B, f bundle.File, k bundle.Packing, workers int) int64 {
	dir := b.TempDir()
	out, err := os.Create(dir + "/fw.zip")
	require.NoError(b, err)
	defer out.Close()
	scratch, err := os.Create(dir + "/scratch")
	require.NoError(b, err)
	defer scratch.Close()
	m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Src: "a.bin"}}}
	o := &bundle.WriteOptions{Pack: map[string]bundle.Packing{"a": k}, Scratch: scratch, Workers: workers}
	require.NoError(b, bundle.Write(context.Background(), out, m, map[string]bundle.File{"a.bin": f}, o))
	info, err := out.Stat()
	require.NoError(b, err)
	return info.Size()
}

// BenchmarkCreate makes a bundle of a real file in the default way.
func BenchmarkCreate(b *testing.B) {
	f := benchImage(b)
	b.SetBytes(f.size)
	var n int64
	for b.Loop() {
		n = create(b, f, bundle.Packing{Encoding: bundle.EncodingZstd}, 0)
	}
	b.ReportMetric(float64(n)/float64(f.size)*100, "%")
}

// BenchmarkPacking compares levels and sizes of frames on a real file (the tables
// in docs/BUNDLE.md).
func BenchmarkPacking(b *testing.B) {
	f := benchImage(b)
	for _, level := range []int{1, 3, 6, 12} {
		for _, frame := range []int64{64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20} {
			b.Run(fmt.Sprintf("level=%d/frame=%dK", level, frame>>10), func(b *testing.B) {
				b.SetBytes(f.size)
				var n int64
				for b.Loop() {
					n = create(b, f, bundle.Packing{Encoding: bundle.EncodingZstd, Frame: frame, Level: level}, 0)
				}
				b.ReportMetric(float64(n)/float64(f.size)*100, "%")
			})
		}
	}
}

// BenchmarkUpdate says what a device downloads that holds the file
// OTA_BENCH_OLD and installs OTA_BENCH_FILE: the frames with a chunk that the old
// file has nowhere, the index and the rest.
func BenchmarkUpdate(b *testing.B) {
	f := benchImage(b)
	old, err := os.ReadFile(os.Getenv("OTA_BENCH_OLD"))
	if err != nil {
		b.Skip("OTA_BENCH_OLD names no file")
	}
	for _, chunk := range []int64{4 << 10, 8 << 10, 16 << 10, 64 << 10} {
		held := map[[32]byte]bool{}
		for off := int64(0); off < int64(len(old)); off += chunk {
			held[sha256.Sum256(old[off:min(off+chunk, int64(len(old)))])] = true
		}
		for _, frame := range []int64{32 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20} {
			if frame < chunk {
				continue
			}
			b.Run(fmt.Sprintf("chunk=%dK/frame=%dK", chunk>>10, frame>>10), func(b *testing.B) {
				var file bytes.Buffer
				m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Src: "a.bin"}}}
				o := &bundle.WriteOptions{Pack: map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: frame, Chunk: chunk}}}
				require.NoError(b, bundle.Write(context.Background(), &file, m, map[string]bundle.File{"a.bin": f}, o))
				var src *counting
				var wanted []ota.Range
				for b.Loop() {
					src, wanted = source(file.Bytes()), nil
					r, err := (&bundle.Policy{AllowUnsigned: true, MaxIndex: 64 << 20}).OpenRanges(context.Background(), src)
					require.NoError(b, err)
					p, err := r.Next(context.Background())
					require.NoError(b, err)
					for i, sum := range p.Chunks.SHA256 {
						if held[sum] {
							continue
						}
						w := ota.Range{Off: int64(i) * chunk, Len: min(chunk, p.Size-int64(i)*chunk)}
						if k := len(wanted) - 1; k >= 0 && wanted[k].Off+wanted[k].Len == w.Off {
							wanted[k].Len += w.Len
						} else {
							wanted = append(wanted, w)
						}
					}
					require.NoError(b, p.Data.(ota.Selector).Select(wanted))
					_, err = io.Copy(io.Discard, p.Data)
					require.NoError(b, err)
					_, err = r.Next(context.Background())
					require.Equal(b, io.EOF, err)
				}
				new := int64(0)
				for _, w := range wanted {
					new += w.Len
				}
				ranges := 0
				for _, rs := range src.asked {
					ranges += len(rs)
				}
				b.ReportMetric(float64(src.bytes)/(1<<20), "MiB-read")
				b.ReportMetric(float64(new)/(1<<20), "MiB-new")
				b.ReportMetric(float64(file.Len())/(1<<20), "MiB-bundle")
				b.ReportMetric(float64(ranges), "ranges")
			})
		}
	}
}

// BenchmarkDecode reads a bundle of a real file, as an installer does.
func BenchmarkDecode(b *testing.B) {
	f := benchImage(b)
	for _, frame := range []int64{64 << 10, 128 << 10, 256 << 10, 1 << 20, 4 << 20} {
		var file bytes.Buffer
		m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Src: "a.bin"}}}
		o := &bundle.WriteOptions{Pack: map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: frame}}}
		for _, workers := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("frame=%dK/workers=%d", frame>>10, workers), func(b *testing.B) {
				if file.Len() == 0 {
					require.NoError(b, bundle.Write(context.Background(), &file, m, map[string]bundle.File{"a.bin": f}, o))
				}
				b.SetBytes(f.size)
				b.ReportAllocs()
				buf := make([]byte, 256<<10)
				for b.Loop() {
					r, err := (&bundle.Policy{AllowUnsigned: true, Workers: workers}).Open(context.Background(), bytes.NewReader(file.Bytes()))
					require.NoError(b, err)
					p, err := r.Next(context.Background())
					for err == nil {
						_, err = p.Data.Read(buf)
					}
					require.Equal(b, io.EOF, err)
				}
			})
		}
	}
}

// BenchmarkVerifyFile verifies bundles of a real file that lie on a disk.
func BenchmarkVerifyFile(b *testing.B) {
	f := benchImage(b)
	for name, k := range map[string]bundle.Packing{"stored": {}, "chunks": {Chunk: 4096}, "zstd": {Encoding: bundle.EncodingZstd}} {
		b.Run(name, func(b *testing.B) {
			path := b.TempDir() + "/fw.zip"
			out, err := os.Create(path)
			require.NoError(b, err)
			m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Src: "a.bin"}}}
			o := &bundle.WriteOptions{Pack: map[string]bundle.Packing{"a": k}}
			require.NoError(b, bundle.Write(context.Background(), out, m, map[string]bundle.File{"a.bin": f}, o))
			require.NoError(b, out.Close())
			for b.Loop() {
				in, err := os.Open(path)
				require.NoError(b, err)
				_, err = lax.Verify(context.Background(), in)
				require.NoError(b, err)
				require.NoError(b, in.Close())
			}
			info, err := os.Stat(path)
			require.NoError(b, err)
			b.SetBytes(info.Size())
		})
	}
}
