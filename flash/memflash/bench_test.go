package memflash_test

import (
	"bytes"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
)

func BenchmarkFlash(b *testing.B) {
	const size, piece = 64 << 20, 256 << 10
	data := bytes.Repeat([]byte{0x5a, 1, 2, 3, 4, 5, 6, 7}, piece/8)
	for _, c := range []struct {
		name string
		cfg  memflash.Config
	}{
		{"plain", memflash.Config{Size: size}},
		{"nor", memflash.Config{Size: size, EraseSize: 64 << 10, WriteSize: 256}},
		{"rewritable", memflash.Config{Size: size, EraseSize: 64 << 10, Rewrite: true}},
		{"erasedzero", memflash.Config{Size: size, EraseSize: 64 << 10, ErasedZero: true}},
	} {
		f := memflash.New(c.cfg)
		e, _ := f.(ota.Eraser)
		b.Run("write/"+c.name, func(b *testing.B) {
			b.SetBytes(piece)
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if e != nil && off == 0 {
					b.StopTimer()
					if err := e.Erase(0, size); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				if _, err := f.WriteAt(data, off); err != nil {
					b.Fatal(err)
				}
				off = (off + piece) % size
			}
		})
		b.Run("read/"+c.name, func(b *testing.B) {
			b.SetBytes(piece)
			b.ReportAllocs()
			buf := make([]byte, piece)
			off := int64(0)
			for b.Loop() {
				if _, err := f.ReadAt(buf, off); err != nil {
					b.Fatal(err)
				}
				off = (off + piece) % size
			}
		})
		if e != nil {
			b.Run("erase/"+c.name, func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					if err := e.Erase(0, size); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
	b.Run("memcpy", func(b *testing.B) {
		b.SetBytes(piece)
		buf := make([]byte, size)
		off := 0
		for b.Loop() {
			copy(buf[off:], data)
			off = (off + piece) % size
		}
	})
}

// BenchmarkClone is the fixed cost of one run of a sweep: clone, then change one
// erase unit.
func BenchmarkClone(b *testing.B) {
	base := memflash.NewChip(
		memflash.Config{Size: 1 << 20, EraseSize: 4096},
		memflash.Config{Size: 1 << 20, EraseSize: 4096})
	rec := make([]byte, 256)
	for b.Loop() {
		c := base.Clone()
		f := c.Flashes()[0]
		if err := f.(ota.Eraser).Erase(8192, 4096); err != nil {
			b.Fatal(err)
		}
		if _, err := f.WriteAt(rec, 8192); err != nil {
			b.Fatal(err)
		}
	}
}
