package ota_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/slotota/ota"
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
