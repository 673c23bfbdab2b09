package ota_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// chunked is an image of one part, in chunks if size is not 0.
type chunked struct {
	content  []byte
	size     int64
	stream   bool          // the data cannot be selected from
	hostile  func([]byte)  // changes what the data yields
	passed   bool          // Select was called without ranges
	cut      int64         // after so many bytes the data fails with errCut; 0: never
	selected *int64        // counts
	each     func(n int64) // told how much was read so far

	next int
}

var errCut = errors.New("connection lost")

func (c *chunked) Info() ota.ImageInfo {
	sum := sha256.Sum256(c.content)
	p := ota.PartInfo{Name: "app", Size: int64(len(c.content)), SHA256: &sum}
	if c.size > 0 {
		p.Chunks = &ota.Chunks{Size: c.size}
		for b := range slices.Chunk(c.content, int(c.size)) {
			p.Chunks.SHA256 = append(p.Chunks.SHA256, sha256.Sum256(b))
		}
	}
	return ota.ImageInfo{SignedBy: []string{"test"}, Parts: []ota.PartInfo{p}}
}

func (c *chunked) Next(ctx context.Context) (*ota.ImagePart, error) {
	if c.next++; c.next > 1 {
		return nil, io.EOF
	}
	content := c.content
	if c.hostile != nil {
		content = bytes.Clone(content)
		c.hostile(content)
	}
	d := &chunkedData{ctx: ctx, c: c, content: content, wanted: []ota.Range{{Off: 0, Len: int64(len(content))}}}
	p := &ota.ImagePart{PartInfo: ota.PartInfo{Name: "app", Size: int64(len(c.content))}, Data: d}
	if c.stream {
		p.Data = struct{ io.Reader }{d}
	}
	return p, nil
}

type chunkedData struct {
	ctx     context.Context
	c       *chunked
	content []byte
	wanted  []ota.Range
	read    int64
	done    bool
}

// Select also checks that it is called as promised.
func (d *chunkedData) Select(wanted []ota.Range) error {
	if d.done || d.read > 0 {
		return errors.New("selected late, or twice")
	}
	end := int64(-1)
	for _, r := range wanted {
		whole := func(n int64) bool { return n%d.c.size == 0 || n == int64(len(d.content)) }
		if r.Len <= 0 || r.Off <= end || !whole(r.Off) || !whole(r.Off+r.Len) || r.Off+r.Len > int64(len(d.content)) {
			return fmt.Errorf("ranges %v", wanted)
		}
		end = r.Off + r.Len
	}
	d.done, d.wanted, d.c.passed = true, slices.Clone(wanted), len(wanted) == 0
	return nil
}

func (d *chunkedData) Read(p []byte) (int, error) {
	if err := d.ctx.Err(); err != nil {
		return 0, err
	}
	if d.c.cut > 0 && d.read >= d.c.cut {
		return 0, errCut
	}
	for len(d.wanted) > 0 && d.wanted[0].Len == 0 {
		d.wanted = d.wanted[1:]
	}
	if len(d.wanted) == 0 {
		return 0, io.EOF
	}
	r := &d.wanted[0]
	n := copy(p, d.content[r.Off:r.Off+r.Len])
	r.Off, r.Len = r.Off+int64(n), r.Len-int64(n)
	d.read += int64(n)
	if d.c.selected != nil {
		*d.c.selected += int64(n)
	}
	if d.c.each != nil {
		d.c.each(d.read)
	}
	return n, nil
}

// target is a device with two slots of one part each, of which slot 0 runs.
type target struct {
	t    testing.TB
	chip *memflash.Chip
	o    ota.Options
	wrap func(ota.Flash) ota.Flash // of slot 1, if not nil

	mutable bool // the part of slot 1
	dev     *ota.Device
}

func newTarget(t testing.TB, cfg memflash.Config, o ota.Options) *target {
	record := memflash.Config{Size: 4 << 10}
	d := &target{t: t, o: o, chip: memflash.NewChip(cfg, cfg, record, record, record)}
	d.open()
	return d
}

// open starts the program on the device anew.
func (d *target) open() {
	f := d.chip.Flashes()
	record, err := bootrecord.New(f[2:], &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return 0, nil },
	})
	require.NoError(d.t, err)
	if d.wrap != nil {
		f[1] = d.wrap(f[1])
	}
	d.dev, err = ota.Open(d.t.Context(), record, []ota.Slot{
		{Parts: []ota.Part{{Name: "app", Flash: f[0]}}}, {Parts: []ota.Part{{Name: "app", Flash: f[1], Mutable: d.mutable}}},
	}, &d.o)
	require.NoError(d.t, err)
}

// try updates, and goes back.
func (d *target) try(img *chunked) (ota.UpdateResult, error) {
	d.t.Helper()
	res, err := d.dev.Update(d.t.Context(), img, nil)
	if err == nil {
		require.Equal(d.t, ota.SlotID(1), res.Slot)
		require.Equal(d.t, img.content, d.peek(1, len(img.content)))
		require.Equal(d.t, int64(len(img.content)), res.Written+res.Skipped)
		require.NoError(d.t, d.dev.Revert(d.t.Context()))
	}
	require.NoError(d.t, d.chip.Err())
	return res, err
}

func (d *target) update(img *chunked) ota.UpdateResult {
	d.t.Helper()
	res, err := d.try(img)
	require.NoError(d.t, err)
	return res
}

func (d *target) peek(flash, n int) []byte {
	b := make([]byte, n)
	require.NoError(d.t, d.chip.Peek(flash, b, 0))
	return b
}

// fill puts content into a slot, as the factory would.
func (d *target) fill(flash int, content []byte, cfg memflash.Config) {
	blank := byte(0xff)
	if cfg.ErasedZero {
		blank = 0
	}
	b := bytes.Repeat([]byte{blank}, int(d.chip.Flashes()[flash].Size()))
	copy(b, content)
	require.NoError(d.t, d.chip.Poke(flash, b, 0))
}

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, seed))).Read(b)
	return b
}

// changedUnits returns how many times each erase unit has to be erased to turn old
// into want.
func changedUnits(f ota.Flash, old, want []byte) []int {
	var n []int
	for off := int64(0); off < f.Size(); {
		_, size := ota.EraseUnit(f, off)
		b := bytes.Repeat([]byte{ota.ErasedByte(f)}, int(size))
		if off < int64(len(want)) {
			copy(b, want[off:])
		}
		if bytes.Equal(b, old[off:off+size]) {
			n = append(n, 0)
		} else {
			n = append(n, 1)
		}
		off += size
	}
	return n
}

func minus(a, b []int) []int {
	a = slices.Clone(a)
	for i := range a {
		a[i] -= b[i]
	}
	return a
}

// There are enough blocks for a chunk, also where BufferSize is no multiple of the erase
// unit.
func TestBlocksSuffice(t *testing.T) {
	for _, tc := range []struct{ unit, buffer, chunk int64 }{
		{64 << 10, 128<<10 - 1, 1 << 20},
		{192 << 10, 0, ota.MaxChunk},
		{4 << 10, 8<<10 - 1, 256 << 10},
		{64 << 10, 1, 1 << 20},
	} {
		synctest.Test(t, func(t *testing.T) {
			size := tc.chunk + tc.chunk/2
			cfg := memflash.Config{Size: (size/tc.unit + 1) * tc.unit, EraseSize: tc.unit}
			d := newTarget(t, cfg, ota.Options{BufferSize: int(tc.buffer)})
			// Without UnitEraser.
			d.wrap = func(f ota.Flash) ota.Flash { return plainEraser{flash{f}, f.(ota.Eraser), tc.unit} }
			d.open()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			img := &chunked{content: random(1, int(size)-100), size: tc.chunk}
			_, err := d.dev.Update(ctx, img, nil)
			require.NoError(t, err, "%+v", tc)
			require.Equal(t, img.content, d.peek(1, len(img.content)))
		})
	}
}

// Whatever the medium, the chunks, the buffers and what was there before: the slot
// holds the image in the end; what had not changed is neither erased nor written;
// and nothing is erased twice.
func TestInstallMatrix(t *testing.T) {
	geometries := []memflash.Config{
		{Size: 256 << 10},
		{Size: 100_001},
		{Size: 300 << 10, WriteSize: 512},
		{Size: 256 << 10, Unsynced: true},
		{Size: 256 << 10, EraseSize: 4 << 10},
		{Size: 256 << 10, EraseSize: 4 << 10, WriteSize: 256, ErasedZero: true},
		{Size: 270 << 10, EraseSize: 6 << 10, WriteSize: 3 << 10},
		{EraseUnits: []int64{16 << 10, 16 << 10, 64 << 10, 4 << 10, 64 << 10, 4 << 10, 64 << 10, 1 << 10, 23 << 10}, WriteSize: 8},
		{Size: 384 << 10, EraseSize: 192 << 10},
	}
	rng := rand.New(rand.NewPCG(1, 2))
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	for _, cfg := range geometries {
		for round := range rounds {
			seed := uint64(round)
			t.Run(fmt.Sprintf("%d-%d-%d/%d", cfg.Size, cfg.EraseSize, cfg.WriteSize, round), func(t *testing.T) {
				d := newTarget(t, cfg, ota.Options{BufferSize: 1 << (9 + rng.IntN(9))})
				f := d.chip.Flashes()[1]
				_, eraser := f.(ota.Eraser)
				pieces := []int64{0, 1, 7, 1000, 4096, 5000, 16 << 10, 64 << 10, 200 << 10, ota.MaxChunk}
				img := &chunked{size: pieces[rng.IntN(len(pieces))], stream: rng.IntN(3) == 0}
				if img.size > 0 && img.size < 100 {
					img.size *= 311
				}
				v1 := random(seed, max(1, int(f.Size())-rng.IntN(40_000)))
				if rng.IntN(5) == 0 {
					clear(v1[len(v1)/3 : len(v1)/2])
					copy(v1[len(v1)/2:], bytes.Repeat([]byte{0xff}, len(v1)/8))
				}
				img.content = v1
				d.fill(0, v1, cfg)
				known := rng.IntN(2) == 0
				if known {
					d.update(img)
				} else if rng.IntN(2) == 0 {
					d.fill(1, v1, cfg)
				}

				// Version 2 differs here and there, and in length.
				v2 := bytes.Clone(v1)
				for range rng.IntN(6) {
					at := rng.IntN(len(v2))
					copy(v2[at:], random(seed+9, rng.IntN(20_000)))
				}
				if rng.IntN(3) == 0 {
					v2 = v2[:len(v2)-rng.IntN(min(len(v2), 30_000))]
				}
				old := d.peek(1, int(f.Size()))
				wear := d.chip.Wear(1)
				before := d.chip.Stats()
				next := &chunked{content: v2, size: img.size, stream: img.stream}
				res := d.update(next)
				if !eraser {
					require.LessOrEqual(t, d.chip.Stats().BytesWritten-before.BytesWritten, res.Written+512+12*4096)
				} else {
					got, need := minus(d.chip.Wear(1), wear), changedUnits(f, old, v2)
					if known {
						require.Equal(t, need, got, "erased")
					}
					require.LessOrEqual(t, slices.Max(got), 1, "erased twice")
					for i := range got {
						require.GreaterOrEqual(t, got[i], need[i])
					}
				}
				require.LessOrEqual(t, res.Read, int64(len(v2)))
				res = d.update(next)
				require.Zero(t, res.Written, "the same again")
			})
		}
	}
}

// A firmware of 1 MiB on NOR with sectors of 4 KiB: what is erased are the sectors
// that changed, each once, whatever the chunks.
func TestErasesOnlyWhatChanged(t *testing.T) {
	cfg := memflash.Config{Size: 1 << 20, EraseSize: 4 << 10, WriteSize: 256, EraseLimit: 3}
	for _, chunk := range []int64{0, 1000, 4 << 10, 16 << 10, 64 << 10, 100_000} {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprint(chunk, stream), func(t *testing.T) {
				d := newTarget(t, cfg, ota.Options{})
				v1 := random(1, 1<<20)
				d.fill(0, v1, cfg)
				d.update(&chunked{content: v1, size: chunk, stream: stream})
				v2 := bytes.Clone(v1)
				for _, at := range []int{0, 4095, 4096, 70_000, 300_000, 1<<20 - 1} {
					v2[at] ^= 1
				}
				copy(v2[500_000:], random(2, 50_000))
				old, wear, before := d.peek(1, 1<<20), d.chip.Wear(1), d.chip.Stats()
				res := d.update(&chunked{content: v2, size: chunk, stream: stream})
				need := changedUnits(d.chip.Flashes()[1], old, v2)
				require.Equal(t, need, minus(d.chip.Wear(1), wear))
				erased := 0
				for _, n := range need {
					erased += 4096 * n
				}
				require.EqualValues(t, erased, res.Written)
				require.LessOrEqual(t, d.chip.Stats().BytesErased-before.BytesErased, int64(erased))
			})
		}
	}
}

// spy notes what is done to a slot.
type spy struct {
	ota.Flash
	wrote func(p []byte, off int64)
}

func (s *spy) WriteAt(p []byte, off int64) (int, error) {
	s.wrote(p, off)
	return s.Flash.WriteAt(p, off)
}

type eraseSpy struct {
	*spy
	ota.Eraser
}

// inSequence refuses writes that leave something out.
type inSequence struct {
	*spy
	next int64
}

func (s *inSequence) WritesInSequence() bool { return true }

// Where everything has to be written in sequence nothing in place is passed over.
func TestWritesInSequence(t *testing.T) {
	const size = 200_000
	content := random(1, size)
	d := newTarget(t, memflash.Config{Size: 256 << 10}, ota.Options{BufferSize: 8 << 10})
	d.wrap = func(f ota.Flash) ota.Flash {
		s := &inSequence{}
		s.spy = &spy{Flash: f, wrote: func(p []byte, off int64) {
			if off != 0 && off != s.next {
				t.Errorf("written at %d, not %d", off, s.next)
			}
			s.next = off + int64(len(p))
		}}
		return s
	}
	d.open()
	d.update(&chunked{content: content, size: 4096})
	for i, img := range []chunked{{}, {size: 4096}, {size: 4096, stream: true}} {
		img.content = bytes.Clone(content)
		img.content[100_000] ^= byte(i + 1)
		res := d.update(&img)
		require.EqualValues(t, size, res.Written)
	}
}

// With digests of chunks no byte reaches the flash before its chunk was found to be
// authentic, wherever the data lies.
func TestNothingUnauthenticatedIsWritten(t *testing.T) {
	const size = 200_000
	content := random(1, size)
	for _, cfg := range []memflash.Config{{Size: 256 << 10}, {Size: 256 << 10, EraseSize: 4 << 10}, {Size: 256 << 10, EraseSize: 64 << 10}} {
		for _, chunk := range []int64{1000, 4 << 10, 16 << 10, 60_000, 150_000} {
			for _, buffer := range []int{512, 32 << 10} {
				for _, at := range []int{0, 59_999, 60_000, size - 1} {
					d := newTarget(t, cfg, ota.Options{BufferSize: buffer})
					d.wrap = func(f ota.Flash) ota.Flash {
						s := &spy{Flash: f, wrote: func(p []byte, off int64) {
							if off+int64(len(p)) > size {
								p = p[:size-off]
							}
							lie := int64(at) / chunk * chunk
							if !bytes.Equal(content[off:off+int64(len(p))], p) || off < min(lie+chunk, size) && lie < off+int64(len(p)) {
								t.Errorf("%d bytes at %d were written; the lie is at %d, chunks have %d bytes, blocks %d", len(p), off, at, chunk, buffer)
							}
						}}
						if e, ok := f.(ota.Eraser); ok {
							return eraseSpy{s, e}
						}
						return s
					}
					d.open()
					for _, stream := range []bool{false, true} {
						img := &chunked{content: content, size: chunk, stream: stream, hostile: func(b []byte) { b[at] ^= 0x40 }}
						_, err := d.try(img)
						require.ErrorIs(t, err, ota.ErrDigest)
						var e *ota.Error
						require.ErrorAs(t, err, &e)
						require.Equal(t, int64(at)/chunk*chunk, e.Off)
					}
				}
			}
		}
	}
}

// What a power cut has left half programmed may read well at first, and not later. The
// next update writes it again.
func TestRewritesWhatACutLeft(t *testing.T) {
	const size = 48 << 10
	v1, v2 := random(1, size), random(2, size)
	for _, cfg := range []memflash.Config{{Size: size}, {Size: size, EraseSize: 4 << 10}, {EraseUnits: []int64{4 << 10, 8 << 10, 4 << 10, 32 << 10}}} {
		for _, img := range []chunked{{}, {size: 3000}, {size: 8 << 10}, {size: 8 << 10, stream: true}} {
			fresh := newTarget(t, cfg, ota.Options{BufferSize: 4 << 10})
			old := img
			old.content, img.content = v1, v2
			fresh.update(&old)
			for at := fresh.chip.Ops(); ; at++ {
				d := &target{t: t, o: fresh.o, chip: fresh.chip.Clone()}
				d.open()
				d.chip.Plan(memflash.Fault{Kind: memflash.CutWeak, On: memflash.OpWrite, At: at - fresh.chip.Ops(), N: 1, Seed: uint64(at), Flash: 1, Len: size})
				next := img
				_, err := d.dev.Update(t.Context(), &next, nil)
				if err == nil {
					break
				}
				require.ErrorIs(t, err, memflash.ErrPowerOff)
				d.chip.PowerOn()
				d.open()
				next = img
				d.update(&next)
				got := make([]byte, size)
				for range 20 {
					_, err := d.chip.Flashes()[1].ReadAt(got, 0)
					require.NoError(t, err)
					require.True(t, bytes.Equal(v2, got), "cut at %d: %+v, %d", at, cfg, img.size)
				}
			}
		}
	}
}

// Where only some sectors had to be written, the one that the power cut has caught is
// not to be told from those around it: all are written again.
func TestWeakBitsInBetween(t *testing.T) {
	const size, sector = 32 << 10, 4 << 10
	cfg := memflash.Config{Size: size, EraseSize: sector}
	v1 := random(1, size)
	v2 := bytes.Clone(v1)
	for _, at := range []int{1, 3, 6} {
		v2[at*sector+100] ^= 0xff
	}
	for _, img := range []chunked{{}, {size: sector}} {
		// With larger blocks all sectors would lie within one of the first difference,
		// and those are written again on any medium.
		fresh := newTarget(t, cfg, ota.Options{BufferSize: sector})
		old := img
		old.content, img.content = v1, v2
		fresh.update(&old)
		for seed := range uint64(60) {
			for _, at := range []int64{1, 3} {
				d := &target{t: t, o: fresh.o, chip: fresh.chip.Clone()}
				d.open()
				d.chip.Plan(memflash.Fault{Kind: memflash.CutWeak, On: memflash.OpWrite, N: 1, Seed: seed, Flash: 1, Off: at * sector, Len: 1})
				next := img
				_, err := d.dev.Update(t.Context(), &next, nil)
				require.ErrorIs(t, err, memflash.ErrPowerOff)
				d.chip.PowerOn()
				d.open()
				next = img
				d.update(&next)
				got := make([]byte, size)
				for range 20 {
					_, err := d.chip.Flashes()[1].ReadAt(got, 0)
					require.NoError(t, err)
					require.True(t, bytes.Equal(v2, got), "seed %d, sector %d", seed, at)
				}
			}
		}
	}
}

// A part that the firmware writes to may hold what a power cut has left of that: it is
// not believed, though nobody has updated the slot since it was verified.
func TestWeakBitsInMutablePart(t *testing.T) {
	const size, sector = 32 << 10, 4 << 10
	cfg := memflash.Config{Size: size, EraseSize: sector}
	v1, v2 := random(1, size), random(2, size)
	copy(v2, v1[:size/2])
	for _, chunk := range []int64{0, sector} {
		for seed := range uint64(20) {
			d := newTarget(t, cfg, ota.Options{})
			d.mutable = true
			d.open()
			d.update(&chunked{content: v1, size: chunk})
			// Its firmware runs, and is cut short in a write.
			f := d.chip.Flashes()[1]
			require.NoError(t, f.(ota.Eraser).Erase(5*sector, sector))
			d.chip.Plan(memflash.Fault{Kind: memflash.CutWeak, At: d.chip.Ops(), Seed: seed})
			_, err := f.WriteAt(v2[5*sector:6*sector], 5*sector)
			require.ErrorIs(t, err, memflash.ErrPowerOff)
			d.chip.PowerOn()
			d.open()
			d.update(&chunked{content: v2, size: chunk})
			got := make([]byte, size)
			for range 20 {
				_, err := f.ReadAt(got, 0)
				require.NoError(t, err)
				require.True(t, bytes.Equal(v2, got), "seed %d, chunks of %d", seed, chunk)
			}
		}
	}
}

// What lies behind the data may read as erased although a power cut has ended its
// erasure: it is erased again.
func TestWeakBitsBehind(t *testing.T) {
	const size, sector = 32 << 10, 4 << 10
	img := chunked{content: random(2, size-2*sector)}
	fresh := newTarget(t, memflash.Config{Size: size, EraseSize: sector}, ota.Options{})
	fresh.update(&chunked{content: random(1, size)})
	for seed := range uint64(40) {
		d := &target{t: t, o: fresh.o, chip: fresh.chip.Clone()}
		// All but a few bits are erased, and those read well at times.
		require.NoError(t, d.chip.Poke(1, bytes.Repeat([]byte{0xff}, sector-1), size-sector))
		d.open()
		d.chip.Plan(memflash.Fault{Kind: memflash.CutWeak, On: memflash.OpErase, N: 1, Seed: seed, Flash: 1, Off: size - sector, Len: 1})
		next := img
		_, err := d.dev.Update(t.Context(), &next, nil)
		require.ErrorIs(t, err, memflash.ErrPowerOff)
		d.chip.PowerOn()
		d.open()
		next = img
		d.update(&next)
		got := make([]byte, sector)
		for range 20 {
			_, err := d.chip.Flashes()[1].ReadAt(got, size-sector)
			require.NoError(t, err)
			require.Equal(t, bytes.Repeat([]byte{0xff}, sector), got, "seed %d", seed)
		}
	}
}

// What the running slot holds is copied from there, and checked on the way.
func TestCopiesFromTheRunningSlot(t *testing.T) {
	cfg := memflash.Config{Size: 1 << 20}
	d := newTarget(t, cfg, ota.Options{BufferSize: 32 << 10})
	v1 := random(1, 1<<20)
	d.fill(0, v1, cfg)
	// Moved by some chunks, and with a chunk of its own.
	v2 := slices.Concat(v1[3*4096:], v1[:3*4096])
	copy(v2[100*4096:], random(2, 4096))
	img := &chunked{content: v2, size: 4096}
	res := d.update(img)
	require.EqualValues(t, 4096, res.Read)
	require.EqualValues(t, 1<<20-4096, res.Copied)
	require.EqualValues(t, 1<<20, res.Written)
	require.Equal(t, res.Counts, d.dev.Status().Counts)

	// A mutable part may change while it is read, so nothing is taken from it.
	d.fill(1, nil, cfg)
	f := d.chip.Flashes()
	record, err := bootrecord.New(f[2:], &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	d.dev, err = ota.Open(t.Context(), record, []ota.Slot{
		{Parts: []ota.Part{{Name: "app", Flash: f[0], Mutable: true}}}, {Parts: []ota.Part{{Name: "app", Flash: f[1], Mutable: true}}},
	}, nil)
	require.NoError(t, err)
	res = d.update(&chunked{content: v2, size: 4096})
	require.Zero(t, res.Copied)
}

// Files move by pages, not by chunks.
func TestFindsWhatHasMoved(t *testing.T) {
	const size, chunk = 5 << 20, 16 << 10
	cfg := memflash.Config{Size: size}
	v2 := random(2, size)
	for name, c := range map[string]struct {
		v1      []byte
		changes int64 // chunks that are not in v1, or are passed over
	}{
		"there":             {v2, 0},
		"a page before":     {slices.Concat(v2[4096:], v2[:4096]), 1},
		"three pages on":    {slices.Concat(v2[size-3*4096:], v2[:size-3*4096]), 1},
		"here and there":    {slices.Concat(v2[40*4096:70*4096], v2[1001*4096:], v2[:40*4096], v2[70*4096:1001*4096]), 4},
		"not by pages":      {slices.Concat(v2[100:], v2[:100]), size / chunk},
		"behind other data": {slices.Concat(random(3, 401*4096), v2[:size-401*4096]), (401*4096+chunk-1)/chunk + 4},
		"nowhere":           {random(4, size), size / chunk},
	} {
		for _, block := range []int{16 << 10, 32 << 10, 80 << 10} {
			t.Run(fmt.Sprint(name, " ", block), func(t *testing.T) {
				d := newTarget(t, cfg, ota.Options{BufferSize: block})
				d.fill(0, c.v1, cfg)
				res := d.update(&chunked{content: v2, size: chunk})
				require.True(t, bytes.Equal(v2, d.peek(1, size)))
				require.EqualValues(t, size, res.Read+res.Copied)
				if block >= 2*chunk { // else there is no room to look at every page
					require.LessOrEqual(t, res.Read, c.changes*chunk)
				}
			})
		}
	}
}

// The last chunk, which is shorter, is found where the firmware of another slot ends.
func TestFindsTheEnd(t *testing.T) {
	const size, chunk = 5<<20 + 1234, 16 << 10
	cfg := memflash.Config{Size: size}
	d := newTarget(t, cfg, ota.Options{BufferSize: 64 << 10})
	v2 := random(2, size)
	v1 := slices.Clone(v2)
	v1[100*chunk]++
	d.fill(0, v1, cfg)
	res := d.update(&chunked{content: v2, size: chunk})
	require.EqualValues(t, chunk, res.Read)
	require.EqualValues(t, size-chunk, res.Copied)
}

// What the running slot has not got may be in a third one; which is not asked for what
// is found without it.
func TestFindsInAnotherSlot(t *testing.T) {
	const size, chunk = 64 << 10, 4 << 10
	cfg, record := memflash.Config{Size: size}, memflash.Config{Size: 4 << 10}
	chip := memflash.NewChip(cfg, cfg, cfg, record, record, record)
	v1, v2 := random(1, size), random(2, size)
	require.NoError(t, chip.Poke(0, v1, 0))
	var slots []ota.Slot
	spies := make([]reads, 3)
	for i, f := range chip.Flashes()[:3] {
		spies[i].Flash = f
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: &spies[i]}}})
	}
	rec, err := bootrecord.New(chip.Flashes()[3:], &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return 0, nil },
	})
	require.NoError(t, err)
	dev, err := ota.Open(t.Context(), rec, slots, nil)
	require.NoError(t, err)
	update := func(content []byte) ota.UpdateResult {
		for i := range spies {
			spies[i].n.Store(0)
		}
		res, err := dev.Update(t.Context(), &chunked{content: content, size: chunk}, nil)
		require.NoError(t, err)
		require.NoError(t, dev.Revert(t.Context()))
		return res
	}
	require.Equal(t, ota.SlotID(1), update(v2).Slot)

	v3 := slices.Concat(v1[:size/2], v2[size/2:])
	v3[0]++
	res := update(v3)
	require.Equal(t, ota.SlotID(2), res.Slot)
	require.EqualValues(t, chunk, res.Read)
	require.EqualValues(t, size-chunk, res.Copied)

	res = update(v1)
	require.Equal(t, ota.SlotID(1), res.Slot)
	require.Zero(t, res.Read)
	require.Zero(t, spies[2].n.Load(), "asked without need")
}

// reads counts the calls of ReadAt.
type reads struct {
	ota.Flash
	n atomic.Int64
}

func (r *reads) ReadAt(p []byte, off int64) (int, error) {
	r.n.Add(1)
	return r.Flash.ReadAt(p, off)
}

// lying reads differently the second time.
type lying struct {
	ota.Flash
	mu    sync.Mutex
	reads map[int64]int
}

func (l *lying) ReadAt(p []byte, off int64) (int, error) {
	n, err := l.Flash.ReadAt(p, off)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reads[off]++; l.reads[off] > 2 && n > 0 {
		p[0] ^= 1
	}
	return n, err
}

func TestCopyIsChecked(t *testing.T) {
	cfg := memflash.Config{Size: 64 << 10}
	d := newTarget(t, cfg, ota.Options{BufferSize: 4096})
	v1 := random(1, 64<<10)
	d.fill(0, v1, cfg)
	f := d.chip.Flashes()
	record, err := bootrecord.New(f[2:], &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	written := false
	target := &spy{f[1], func([]byte, int64) { written = true }}
	d.dev, err = ota.Open(t.Context(), record, []ota.Slot{
		{Parts: []ota.Part{{Name: "app", Flash: &lying{Flash: f[0], reads: map[int64]int{}}}}}, {Parts: []ota.Part{{Name: "app", Flash: target}}},
	}, nil)
	require.NoError(t, err)
	// Read once to be measured, once to be found; then it lies.
	_, err = d.dev.Update(t.Context(), &chunked{content: v1, size: 4096}, nil)
	require.ErrorIs(t, err, ota.ErrChanged)
	require.ErrorIs(t, err, ota.ErrDigest)
	require.False(t, written)
}

// What the record says about the target is not believed: its chunks are hashed.
func TestTargetIsHashed(t *testing.T) {
	cfg := memflash.Config{Size: 256 << 10}
	d := newTarget(t, cfg, ota.Options{})
	v1 := random(1, 256<<10)
	d.update(&chunked{content: v1, size: 4096})
	require.NoError(t, d.chip.FlipBit(1, 100_000, 3))
	res := d.update(&chunked{content: v1, size: 4096})
	require.EqualValues(t, 4096, res.Read)
	require.EqualValues(t, 4096, res.Written)

	// What is in place as a whole is passed over.
	again := &chunked{content: v1, size: 4096}
	res = d.update(again)
	require.Equal(t, ota.Counts{Skipped: 256 << 10}, res.Counts)
	require.True(t, again.passed)
}

// An update that is interrupted again and again costs little more than one that is
// not, also if the program is started anew each time.
func TestResume(t *testing.T) {
	const size, chunk, block = 4 << 20, 8 << 10, 4 << 10
	v1, v2 := random(1, size), random(2, size)
	for name, cfg := range map[string]memflash.Config{
		"block device": {Size: size},
		"nor":          {Size: size, EraseSize: 4 << 10, WriteSize: 256},
	} {
		for _, stream := range []bool{false, true} {
			for _, restart := range []bool{false, true} {
				t.Run(fmt.Sprint(name, " stream=", stream, " restart=", restart), func(t *testing.T) {
					rng := rand.New(rand.NewPCG(3, 4))
					d := newTarget(t, cfg, ota.Options{BufferSize: block})
					d.update(&chunked{content: v1, size: chunk, stream: stream})
					before := d.chip.Stats()
					var total, read int64
					for i := range 20 {
						ctx, cancel := context.WithCancel(t.Context())
						img := &chunked{content: v2, size: chunk, stream: stream, selected: &read}
						at := rng.Int64N(size / 20)
						if stream {
							at += int64(i) * size / 20
						}
						if i%2 == 0 {
							img.cut = at + 1
						} else {
							img.each = func(n int64) {
								if n > at {
									cancel()
								}
							}
						}
						res, err := d.dev.Update(ctx, img, nil)
						cancel()
						require.Error(t, err)
						require.True(t, errors.Is(err, errCut) || errors.Is(err, context.Canceled), "%v", err)
						total += res.Written
						if restart {
							d.open()
						}
					}
					res := d.update(&chunked{content: v2, size: chunk, stream: stream, selected: &read})
					total += res.Written
					// On raw flash a restart may have been a power cut.
					kept := !restart || cfg.EraseSize == 0
					if kept {
						require.LessOrEqual(t, total, int64(size*105/100))
						require.LessOrEqual(t, d.chip.Stats().BytesWritten-before.BytesWritten, int64(size*105/100+26*3*4096))
					}
					if kept && !stream {
						require.LessOrEqual(t, read, int64(size+21*12*block), "what was in the pipeline is read again")
					}
					// Another image starts over, by itself.
					res = d.update(&chunked{content: v1, size: chunk, stream: stream})
					require.EqualValues(t, size, res.Written)
				})
			}
		}
	}
}

// cache is a flash behind a cache: what is written is read from there until Sync,
// and afterwards, but reaches the medium at once, damaged if told so.
type cache struct {
	ota.Flash
	mu     sync.Mutex
	cached map[int64][]byte
	damage int64 // offset
	synced bool
	direct bool // offered
	early  int  // direct reads before Sync
}

func (c *cache) WriteAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.synced = false
	c.cached[off] = bytes.Clone(p)
	p = bytes.Clone(p)
	if i := c.damage - off; i >= 0 && i < int64(len(p)) {
		p[i] ^= 1
	}
	return c.Flash.WriteAt(p, off)
}

func (c *cache) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.Flash.ReadAt(p, off)
	for at, b := range c.cached {
		for i := range b {
			if k := at + int64(i) - off; k >= 0 && k < int64(n) {
				p[k] = b[i]
			}
		}
	}
	return n, err
}

func (c *cache) Sync() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.synced = true
	return c.Flash.Sync()
}

func (c *cache) DirectReader() io.ReaderAt {
	if !c.direct {
		return nil
	}
	return &directly{c}
}

type directly struct{ c *cache }

func (d *directly) ReadAt(p []byte, off int64) (int, error) {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	if !d.c.synced {
		d.c.early++
	}
	return d.c.Flash.ReadAt(p, off)
}

// What is read back comes from the medium, and while the rest is still written.
func TestReadsBackFromTheMedium(t *testing.T) {
	const size = 256 << 10
	for _, damage := range []int64{-1, 0, 100_000, size - 1} {
		for _, chunk := range []int64{0, 4096} {
			d := newTarget(t, memflash.Config{Size: size}, ota.Options{BufferSize: 4096})
			c := &cache{cached: map[int64][]byte{}, damage: damage, direct: true}
			d.wrap = func(f ota.Flash) ota.Flash { c.Flash = f; return c }
			d.open()
			_, err := d.dev.Update(t.Context(), &chunked{content: random(1, size), size: chunk}, nil)
			if damage < 0 {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, ota.ErrVerify)
				s, err := d.dev.BootState(t.Context())
				require.NoError(t, err)
				require.True(t, s.Committed)
			}
			require.Positive(t, c.early, "the read-back runs beside the writes")
		}
	}
}

// A sync that fails makes good read-backs worthless.
func TestSyncFailsAfterReadBack(t *testing.T) {
	const size = 64 << 10
	d := newTarget(t, memflash.Config{Size: size}, ota.Options{BufferSize: 4096})
	c := &cache{cached: map[int64][]byte{}, damage: -1, direct: true}
	d.wrap = func(f ota.Flash) ota.Flash { c.Flash = f; return c }
	d.open()
	d.chip.OnOp(func(op memflash.Op) {
		if op.Flash == 1 && op.Kind == memflash.OpWrite && op.Off == size-4096 {
			d.chip.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpSync})
		}
	})
	_, err := d.dev.Update(t.Context(), &chunked{content: random(1, size)}, nil)
	require.ErrorIs(t, err, memflash.ErrFault)
	s, err := d.dev.BootState(t.Context())
	require.NoError(t, err)
	require.True(t, s.Committed)
	require.Empty(t, s.Slot(1).Parts)
}

// zeroer makes zeros for nothing; in one way or another.
type zeroer struct {
	ota.Flash
	zeroed, wrote int64
	how           error
	lie           bool
}

func (z *zeroer) Zero(off, n int64) error {
	z.zeroed += n
	if z.how != nil || z.lie {
		return z.how
	}
	_, err := z.Flash.WriteAt(make([]byte, n), off)
	return err
}

func (z *zeroer) WriteAt(p []byte, off int64) (int, error) {
	z.wrote += int64(len(p))
	return z.Flash.WriteAt(p, off)
}

// Zeros are left to media that can make them, and read back like all else.
func TestZeros(t *testing.T) {
	const size = 4 << 20
	content := random(1, size)
	clear(content[1<<20 : 3<<20])
	broken := errors.New("broken")
	for _, c := range []struct {
		z     *zeroer
		want  error
		wrote int64
	}{
		{&zeroer{}, nil, 2 << 20},
		{&zeroer{how: ota.ErrUnsupported}, nil, 4 << 20},
		{&zeroer{how: fmt.Errorf("no: %w", ota.ErrUnsupported)}, nil, 4 << 20},
		{&zeroer{how: broken}, broken, -1},
		{&zeroer{lie: true}, ota.ErrVerify, -1},
	} {
		d := newTarget(t, memflash.Config{Size: size}, ota.Options{})
		d.fill(1, random(2, size), memflash.Config{})
		d.wrap = func(f ota.Flash) ota.Flash { c.z.Flash = f; return c.z }
		d.open()
		_, err := d.try(&chunked{content: content})
		require.ErrorIs(t, err, c.want)
		if c.wrote >= 0 {
			require.Equal(t, c.wrote, c.z.wrote)
		}
		require.Positive(t, c.z.zeroed)
	}
	// A region passes it on, and what else a medium offers.
	z := &zeroer{Flash: memflash.New(memflash.Config{Size: size})}
	r, err := ota.Region(z, 4096, 8192)
	require.NoError(t, err)
	require.NoError(t, ota.Zero(r, 0, 8192))
	require.EqualValues(t, 8192, z.zeroed)
	require.ErrorIs(t, ota.Zero(r, 4096, 8192), ota.ErrTooLarge)
	require.ErrorIs(t, ota.Zero(memflash.New(memflash.Config{Size: 10}), 0, 10), ota.ErrUnsupported)
	require.Nil(t, ota.Direct(r))
	require.Zero(t, ota.IOSize(r))
	c := &cache{Flash: memflash.New(memflash.Config{Size: size}), direct: true}
	_, err = c.Flash.WriteAt([]byte("hello"), 4096)
	require.NoError(t, err)
	r, err = ota.Region(c, 4096, 5)
	require.NoError(t, err)
	b := make([]byte, 9)
	n, err := ota.Direct(r).ReadAt(b, 1)
	require.Equal(t, io.EOF, err)
	require.Equal(t, "ello", string(b[:n]))
}

// Blank chunks cost an erase, not a write.
func TestBlankCostsNoWrite(t *testing.T) {
	cfg := memflash.Config{Size: 1 << 20, EraseSize: 4 << 10, WriteSize: 256}
	d := newTarget(t, cfg, ota.Options{})
	d.fill(1, random(1, 1<<20), cfg)
	content := bytes.Repeat([]byte{0xff}, 1<<20)
	copy(content[5000:], "hello")
	before := d.chip.Stats()
	d.update(&chunked{content: content, size: 16 << 10})
	s := d.chip.Stats()
	require.EqualValues(t, 1<<20, s.BytesErased-before.BytesErased)
	require.LessOrEqual(t, s.BytesWritten-before.BytesWritten, int64(5120-4096+12*4096))
}

// An image that has nothing in common with a block device costs little more reading
// than the read-back, and an erase medium is compared in full.
func TestComparingBacksOff(t *testing.T) {
	const size = 16 << 20
	for _, stream := range []bool{true, false} {
		d := newTarget(t, memflash.Config{Size: size}, ota.Options{BufferSize: 16 << 10})
		d.fill(1, random(2, size), memflash.Config{})
		d.update(&chunked{content: random(3, size), size: 4 << 10, stream: stream})
		before := d.chip.Stats().BytesRead
		d.update(&chunked{content: random(1, size), size: 4 << 10, stream: stream})
		require.Less(t, d.chip.Stats().BytesRead-before, int64(size*106/100), "stream: %v", stream)
	}
}

// No more memory is taken than was promised, whatever the size of the image.
func TestMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("2 GiB take too long with the race detector; the run without it covers this")
	}
	for name, c := range map[string]struct {
		size   int64
		buffer int
		chunk  int64 // 0: none
		choose bool
		limit  uint64
	}{
		"stream":        {2 << 30, 0, 0, false, 3 << 20},
		"chunks":        {2 << 30, 0, 64 << 10, true, 4 << 20},
		"small":         {256 << 20, 32 << 10, 0, false, 700 << 10},
		"small, chunks": {256 << 20, 32 << 10, 16 << 10, true, 1 << 20},
		"large chunks":  {256 << 20, 0, 4 << 20, false, 8 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() {
				c.size = 64 << 20
			}
			info := ota.PartInfo{Name: "app", Size: c.size}
			step := max(c.chunk, 64<<10)
			zero, whole := make([]byte, step), sha256.New()
			for range c.size / step {
				whole.Write(zero)
			}
			info.SHA256 = (*[32]byte)(whole.Sum(nil))
			if c.chunk > 0 {
				info.Chunks = &ota.Chunks{Size: c.chunk, SHA256: slices.Repeat([][32]byte{sha256.Sum256(zero[:c.chunk])}, int(c.size/c.chunk))}
			}
			d := newTarget(t, memflash.Config{Size: 4096}, ota.Options{BufferSize: c.buffer})
			d.wrap = func(ota.Flash) ota.Flash { return &void{c.size} }
			d.open()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			img := &zeros{info: ota.ImageInfo{SignedBy: []string{"test"}, Parts: []ota.PartInfo{info}}, choose: c.choose}
			res, err := d.dev.Update(t.Context(), img, nil)
			require.NoError(t, err)
			runtime.ReadMemStats(&after)
			require.Equal(t, c.size, res.Written+res.Skipped)
			require.Less(t, res.Written, int64(10<<20))
			took := after.TotalAlloc - before.TotalAlloc
			t.Logf("%d KiB allocated in all", took>>10)
			require.Less(t, took, c.limit)
		})
	}
}

// void is a flash that reads as zeros, whatever is written.
type void struct{ size int64 }

func (v *void) Size() int64                              { return v.size }
func (v *void) Sync() error                              { return nil }
func (v *void) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
func (v *void) ReadAt(p []byte, off int64) (int, error)  { clear(p); return len(p), nil }

// zeros is an image of zeros.
type zeros struct {
	info   ota.ImageInfo
	choose bool // the data can be selected from
	done   bool
}

func (z *zeros) Info() ota.ImageInfo { return z.info }

func (z *zeros) Next(context.Context) (*ota.ImagePart, error) {
	if z.done {
		return nil, io.EOF
	}
	z.done = true
	p := z.info.Parts[0]
	var data io.Reader = io.NewSectionReader(&void{p.Size}, 0, p.Size)
	if z.choose {
		data = &chosenZeros{}
	}
	return &ota.ImagePart{PartInfo: p, Data: data}, nil
}

type chosenZeros struct{ io.Reader }

func (c *chosenZeros) Select(wanted []ota.Range) error {
	n := int64(0)
	for _, r := range wanted {
		n += r.Len
	}
	c.Reader = io.NewSectionReader(&void{n}, 0, n)
	return nil
}

// blocked never yields anything until its context ends.
type blocked struct{ ctx context.Context }

func (b *blocked) Read([]byte) (int, error) {
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

// Whatever ends an update ends all of its goroutines before it returns, and at once:
// synctest fails on those that are left, and on those that wait for ever.
func TestStagesEnd(t *testing.T) {
	const size = 256 << 10
	content := random(1, size)
	for name, c := range map[string]struct {
		img   func(cancel func()) ota.Image
		fault memflash.Fault
		want  error
	}{
		"cancelled while it reads": {img: func(cancel func()) ota.Image {
			time.AfterFunc(time.Second, cancel)
			return &wrapped{&chunked{content: content}, func(ctx context.Context, r io.Reader) io.Reader {
				return io.MultiReader(io.LimitReader(r, 100_000), &blocked{ctx})
			}}
		}, want: context.Canceled},
		"write fails while it reads": {img: func(func()) ota.Image {
			return &wrapped{&chunked{content: content}, func(ctx context.Context, r io.Reader) io.Reader {
				return io.MultiReader(io.LimitReader(r, 100_000), &blocked{ctx})
			}}
		}, fault: memflash.Fault{Kind: memflash.Fail, On: memflash.OpWrite, Flash: 1, Off: 8192, Len: 10}, want: memflash.ErrFault},
		"bad chunk while it reads": {img: func(func()) ota.Image {
			return &wrapped{&chunked{content: content, size: 4096, hostile: func(b []byte) { b[9000]++ }}, func(ctx context.Context, r io.Reader) io.Reader {
				return io.MultiReader(io.LimitReader(r, 100_000), &blocked{ctx})
			}}
		}, want: ota.ErrDigest},
		"read-back fails": {img: func(func()) ota.Image { return &chunked{content: content} },
			fault: memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, Flash: 1, Off: 8192, Len: 10, Forever: true}, want: memflash.ErrFault},
	} {
		for _, direct := range []bool{false, true} {
			t.Run(fmt.Sprint(name, direct), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					d := newTarget(t, memflash.Config{Size: size}, ota.Options{BufferSize: 4096})
					d.wrap = func(f ota.Flash) ota.Flash {
						return &cache{Flash: f, cached: map[int64][]byte{}, damage: -1, direct: direct}
					}
					d.open()
					if c.fault.Len > 0 {
						d.chip.Plan(c.fault)
					}
					_, err := d.dev.Update(ctx, c.img(cancel), nil)
					require.ErrorIs(t, err, c.want)
					require.Empty(t, d.dev.Status().Busy)
				})
			})
		}
	}
}

// wrapped is an image with other data.
type wrapped struct {
	*chunked
	wrap func(context.Context, io.Reader) io.Reader
}

func (w *wrapped) Next(ctx context.Context) (*ota.ImagePart, error) {
	p, err := w.chunked.Next(ctx)
	if err == nil {
		p.Data = w.wrap(ctx, struct{ io.Reader }{p.Data})
	}
	return p, err
}

// A cancelled update stops within a block: what is in the buffers is not written.
func TestCancelledWithinABlock(t *testing.T) {
	const size, block = 1 << 20, 4096
	d := newTarget(t, memflash.Config{Size: size}, ota.Options{BufferSize: block})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	after := 0
	d.chip.OnOp(func(op memflash.Op) {
		if op.Flash == 1 && op.Kind == memflash.OpWrite {
			if ctx.Err() != nil {
				after++
			}
			if op.Off >= 100*block {
				cancel()
			}
		}
	})
	_, err := d.dev.Update(ctx, &chunked{content: random(1, size), size: block}, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, after)
}

// The stored state forgets the slot before anything in it changes, also if it is one
// chunk only.
func TestForgetsForOneChunk(t *testing.T) {
	for _, cfg := range []memflash.Config{{Size: 256 << 10}, {Size: 256 << 10, EraseSize: 4 << 10}} {
		for _, stream := range []bool{false, true} {
			d := newTarget(t, cfg, ota.Options{})
			content := random(1, 200_000)
			d.update(&chunked{content: content, size: 4096, stream: stream})
			content = bytes.Clone(content)
			content[100_000]++
			changes := 0
			d.chip.OnOp(func(op memflash.Op) {
				if op.Flash == 1 && op.Kind&(memflash.OpWrite|memflash.OpErase) != 0 {
					s, err := d.dev.BootState(context.Background())
					if err != nil || len(s.Slot(1).Parts) > 0 {
						t.Errorf("%v at %d while the state says %+v (%v)", op.Kind, op.Off, s.Slot(1), err)
					}
					changes++
				}
			})
			d.update(&chunked{content: content, size: 4096, stream: stream})
			require.Positive(t, changes)
		}
	}
}

// Chunks that do not describe their part are refused, and nothing is touched.
func TestBadChunks(t *testing.T) {
	for name, mutate := range map[string]func(*ota.PartInfo){
		"no digest of the whole": func(p *ota.PartInfo) { p.SHA256 = nil },
		"size zero":              func(p *ota.PartInfo) { p.Chunks.Size = 0 },
		"negative size":          func(p *ota.PartInfo) { p.Chunks.Size = -4096 },
		"too large":              func(p *ota.PartInfo) { p.Chunks = &ota.Chunks{Size: ota.MaxChunk + 1, SHA256: p.Chunks.SHA256[:1]} },
		"one too few":            func(p *ota.PartInfo) { p.Chunks.SHA256 = p.Chunks.SHA256[1:] },
		"one too many":           func(p *ota.PartInfo) { p.Chunks.SHA256 = append(p.Chunks.SHA256, [32]byte{}) },
		"none":                   func(p *ota.PartInfo) { p.Chunks.SHA256 = nil },
		"largest part":           func(p *ota.PartInfo) { p.Size = 1<<63 - 1 },
	} {
		d := newTarget(t, memflash.Config{Size: 64 << 10}, ota.Options{})
		before := d.chip.Clone()
		img := &mutated{chunked{content: random(1, 50_000), size: 4096}, mutate}
		_, err := d.dev.Update(t.Context(), img, nil)
		want := ota.ErrInvalid
		if name == "no digest of the whole" {
			want = ota.ErrUnverified
		}
		require.ErrorIs(t, err, want, name)
		require.True(t, d.chip.Equal(before), name)
	}
}

type mutated struct {
	chunked
	mutate func(*ota.PartInfo)
}

func (m *mutated) Info() ota.ImageInfo {
	i := m.chunked.Info()
	m.mutate(&i.Parts[0])
	return i
}

// fetched is an image that counts what it downloads.
type fetched struct {
	*wrapped
	n int64
}

func (f *fetched) Downloaded() int64 { return f.n }

// Rate and remaining time follow what was done of late; the counts are all there in
// the last event, and afterwards.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, block = 64 << 10, 1 << 10
		var last ota.Event
		var dev *ota.Device
		var rates []float64
		var etas []time.Duration
		o := ota.Options{BufferSize: block, OnEvent: func(e ota.Event) {
			last = e
			if e.Phase == ota.PhaseWriting {
				s := dev.Status()
				rates, etas = append(rates, s.Rate), append(etas, s.ETA)
			}
		}}
		d := newTarget(t, memflash.Config{Size: size}, o)
		dev = d.dev
		// A block each 250 ms is 4 KiB/s.
		img := &fetched{&wrapped{&chunked{content: random(1, size)}, func(_ context.Context, r io.Reader) io.Reader {
			return &slowReader{r, 250 * time.Millisecond}
		}}, 12345}
		res, err := dev.Update(t.Context(), img, nil)
		require.NoError(t, err)
		require.InDelta(t, 4096, rates[len(rates)/2], 100)
		require.InDelta(t, 8, etas[len(etas)/2].Seconds(), 0.6)
		require.Zero(t, etas[len(etas)-1])
		want := ota.Counts{Downloaded: 12345, Read: size, Written: size}
		require.Equal(t, want, res.Counts)
		require.Equal(t, want, last.Counts)
		require.Equal(t, ota.PhaseDone, last.Phase)
		img.n = 0
		s := dev.Status()
		require.Equal(t, want, s.Counts, "the image is the caller's again")
		require.Zero(t, s.Rate)
		require.NoError(t, dev.Revert(t.Context()))
		require.Equal(t, want, dev.Status().Counts, "they are about the last update")
	})
}
