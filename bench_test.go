package ota_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

// bigImage is an image of one part.
type bigImage struct {
	info ota.ImageInfo
	data []byte
	read bool
}

func (b *bigImage) Info() ota.ImageInfo { return b.info }

func (b *bigImage) Next(context.Context) (*ota.ImagePart, error) {
	if b.read {
		return nil, io.EOF
	}
	b.read = true
	return &ota.ImagePart{PartInfo: b.info.Parts[0], Data: bytes.NewReader(b.data)}, nil
}

// BenchmarkUpdate installs images in memory and reads them back. It reports the
// time as a multiple of hashing the same bytes twice, measured beside it, and
// the heap that an update takes.
func BenchmarkUpdate(b *testing.B) {
	for _, mib := range []int64{1, 64, 256} {
		for _, nor := range []bool{false, true} {
			name := fmt.Sprintf("%dMiB", mib)
			cfg := memflash.Config{Size: mib << 20}
			if nor {
				name += "-nor"
				cfg.EraseSize = 64 << 10
			}
			b.Run(name, func(b *testing.B) { benchmarkUpdate(b, cfg) })
		}
	}
}

func benchmarkUpdate(b *testing.B, cfg memflash.Config) {
	// Two images take turns: what is in place would be skipped.
	var images [2]bigImage
	rng := rand.NewChaCha8([32]byte{})
	for i := range images {
		data := make([]byte, cfg.Size)
		rng.Read(data)
		sum := sha256.Sum256(data)
		images[i] = bigImage{data: data, info: ota.ImageInfo{
			SignedBy: []string{"test"},
			Parts:    []ota.PartInfo{{Name: "app", Size: cfg.Size, SHA256: &sum}},
		}}
	}
	var slots []ota.Slot
	for range 2 {
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: memflash.New(cfg)}}})
	}
	d, err := sim.New(sim.Geometries()[0])
	require.NoError(b, err)
	d.Running = 0
	dev, err := ota.Open(b.Context(), d.Record, slots, nil)
	require.NoError(b, err)
	turn := 0
	update := func() {
		img := images[turn%2]
		turn++
		res, err := dev.Update(b.Context(), &img, nil)
		require.NoError(b, err)
		require.Equal(b, cfg.Size, res.Written)
	}
	// The first update measures the running firmware and makes the simulated
	// medium take its memory.
	update()
	var hashing time.Duration
	var heap uint64
	var before, after runtime.MemStats
	b.SetBytes(cfg.Size)
	for b.Loop() {
		b.StopTimer()
		require.NoError(b, dev.Revert(b.Context()))
		start := time.Now()
		for range 2 {
			sha256.Sum256(images[0].data)
		}
		hashing += time.Since(start)
		runtime.ReadMemStats(&before)
		b.StartTimer()
		update()
		b.StopTimer()
		runtime.ReadMemStats(&after)
		heap = max(heap, after.TotalAlloc-before.TotalAlloc)
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed())/float64(hashing), "x-2sha256")
	b.ReportMetric(float64(heap)/(1<<20), "MiB-heap")
}

// ram is a flash of plain memory, as fast as any.
type ram []byte

func (r ram) Size() int64                              { return int64(len(r)) }
func (r ram) Sync() error                              { return nil }
func (r ram) WriteAt(p []byte, off int64) (int, error) { return copy(r[off:], p), nil }
func (r ram) ReadAt(p []byte, off int64) (int, error)  { return copy(p, r[off:]), nil }

// directRAM is one that is read back while it is written.
type directRAM struct{ ram }

func (r directRAM) DirectReader() io.ReaderAt { return r.ram }

// eraseRAM is one that wants to be erased.
type eraseRAM struct{ ram }

func (r eraseRAM) EraseSize() int64 { return 4 << 10 }

func (r eraseRAM) Erase(off, n int64) error {
	for i := range r.ram[off : off+n] {
		r.ram[off+int64(i)] = 0xff
	}
	return nil
}

// BenchmarkStages shows what the stages of an install cost where the medium costs
// next to nothing.
func BenchmarkStages(b *testing.B) {
	const size = 32 << 20
	v1 := random(1, size)
	other := random(2, size)
	some := bytes.Clone(v1)
	for i := 0; i < size; i += size / 8 {
		copy(some[i:], other[:64<<10])
	}
	for _, c := range []struct {
		name      string
		running   []byte
		old, want []byte
		chunk     int64
		stream    bool
		flash     func(ram) ota.Flash
	}{
		{"everything differs", nil, other, v1, 0, true, nil},
		{"everything differs, read back beside", nil, other, v1, 0, true, func(r ram) ota.Flash { return directRAM{r} }},
		{"everything differs, sectors", nil, other, v1, 0, true, func(r ram) ota.Flash { return eraseRAM{r} }},
		{"nothing differs", nil, v1, v1, 0, true, nil},
		{"chunks, everything differs", nil, other, v1, 64 << 10, true, nil},
		{"chunks, all in place", nil, v1, v1, 64 << 10, false, nil},
		{"chunks, all in the running slot", v1, other, v1, 64 << 10, false, nil},
		{"chunks, all in the running slot, moved by a page", slices.Concat(v1[4096:], v1[:4096]), other, v1, 16 << 10, false, nil},
		{"chunks, some differ", nil, v1, some, 64 << 10, false, nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			d := newTarget(b, memflash.Config{Size: 4096}, ota.Options{})
			f, slot, running := d.chip.Flashes(), make(ram, size), ram(c.running)
			if running == nil {
				running = make(ram, 4096)
			}
			var to ota.Flash = slot
			if c.flash != nil {
				to = c.flash(slot)
			}
			record, err := bootrecord.New(f[2:], &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
			require.NoError(b, err)
			dev, err := ota.Open(b.Context(), record, []ota.Slot{
				{Parts: []ota.Part{{Name: "app", Flash: running}}}, {Parts: []ota.Part{{Name: "app", Flash: to}}},
			}, nil)
			require.NoError(b, err)
			img := &chunked{content: c.want, size: c.chunk, stream: c.stream}
			info := img.Info()
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				// The record does not know what is in the slot.
				if s, err := dev.BootState(b.Context()); err == nil && !s.Committed {
					require.NoError(b, dev.Revert(b.Context()))
					s, err = dev.BootState(b.Context())
					require.NoError(b, err)
					s.Slots[1] = ota.SlotState{}
					require.NoError(b, record.Store(b.Context(), s))
					dev, err = ota.Open(b.Context(), record, []ota.Slot{
						{Parts: []ota.Part{{Name: "app", Flash: running}}}, {Parts: []ota.Part{{Name: "app", Flash: to}}},
					}, nil)
					require.NoError(b, err)
				}
				copy(slot, c.old)
				img.next = 0
				b.StartTimer()
				_, err := dev.Update(b.Context(), &described{img, info}, nil)
				require.NoError(b, err)
			}
		})
	}
}

// described is an image whose description was made before.
type described struct {
	*chunked
	info ota.ImageInfo
}

func (d *described) Info() ota.ImageInfo { return d.info }
