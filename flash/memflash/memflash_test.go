package memflash_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// pattern returns n bytes, none of which is 0x00 or 0xFF.
func pattern(seed uint64, n int) []byte {
	var block [1021]byte // prime, so that no two pages are alike
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range block {
		block[i] = byte(1 + rng.IntN(254))
	}
	return bytes.Repeat(block[:], n/len(block)+1)[:n]
}

func read(t *testing.T, f ota.Flash) []byte {
	t.Helper()
	b := make([]byte, f.Size())
	n, err := f.ReadAt(b, 0)
	require.NoError(t, err)
	require.Len(t, b, n)
	return b
}

func peek(t *testing.T, c *memflash.Chip, flash int) []byte {
	t.Helper()
	b := make([]byte, c.Flashes()[flash].Size())
	require.NoError(t, c.Peek(flash, b, 0))
	return b
}

func write(t *testing.T, f ota.Flash, p []byte, off int64) {
	t.Helper()
	n, err := f.WriteAt(p, off)
	require.NoError(t, err)
	require.Len(t, p, n)
}

func erase(t *testing.T, f ota.Flash, off, n int64) {
	t.Helper()
	require.NoError(t, f.(ota.Eraser).Erase(off, n))
}

func one(cfg memflash.Config) (*memflash.Chip, ota.Flash) {
	c := memflash.NewChip(cfg)
	return c, c.Flashes()[0]
}

var fill = bytes.Repeat

func TestPlain(t *testing.T) {
	c, f := one(memflash.Config{Size: 10000})
	_, ok := f.(ota.Eraser)
	require.False(t, ok)
	require.EqualValues(t, 1, ota.WriteSize(f))
	_, n := ota.EraseUnit(f, 5)
	require.Zero(t, n)
	require.Nil(t, c.Wear(0))

	require.Equal(t, make([]byte, 10000), read(t, f))
	want := make([]byte, 10000)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range uint64(500) {
		off, n := rng.IntN(10000), rng.IntN(6000)
		p := pattern(i, min(n, 10000-off))
		write(t, f, p, int64(off))
		copy(want[off:], p)
	}
	require.Equal(t, want, read(t, f))
	require.NoError(t, f.Sync())
	require.NoError(t, c.Err())

	b := make([]byte, 100)
	k, err := f.ReadAt(b, 9950)
	require.Equal(t, io.EOF, err)
	require.Equal(t, want[9950:], b[:k])
	for _, off := range []int64{10000, 10001, 1 << 62} {
		k, err = f.ReadAt(b, off)
		require.Equal(t, io.EOF, err)
		require.Zero(t, k)
	}
	k, err = f.ReadAt(nil, 3)
	require.NoError(t, err)
	require.Zero(t, k)
}

func TestBounds(t *testing.T) {
	c, f := one(memflash.Config{Size: 8192, EraseSize: 4096, WriteSize: 8})
	e := f.(ota.Eraser)
	var first error
	for _, x := range []struct {
		name string
		err  func() error
		want error
	}{
		{"write past the end", func() error { _, err := f.WriteAt(make([]byte, 16), 8184); return err }, ota.ErrTooLarge},
		{"write far off", func() error { _, err := f.WriteAt(make([]byte, 8), 1<<62); return err }, ota.ErrTooLarge},
		{"write before", func() error { _, err := f.WriteAt(make([]byte, 8), -8); return err }, ota.ErrInvalid},
		{"write part of a unit", func() error { _, err := f.WriteAt(make([]byte, 7), 0); return err }, memflash.ErrAlign},
		{"write between units", func() error { _, err := f.WriteAt(make([]byte, 8), 4); return err }, memflash.ErrAlign},
		{"read before", func() error { _, err := f.ReadAt(make([]byte, 8), -1); return err }, ota.ErrInvalid},
		{"erase past the end", func() error { return e.Erase(4096, 8192) }, ota.ErrTooLarge},
		{"erase before", func() error { return e.Erase(-4096, 4096) }, ota.ErrInvalid},
		{"erase negative", func() error { return e.Erase(4096, -4096) }, ota.ErrInvalid},
		{"erase from inside a unit", func() error { return e.Erase(8, 4088) }, memflash.ErrAlign},
		{"erase into a unit", func() error { return e.Erase(0, 4104) }, memflash.ErrAlign},
	} {
		err := x.err()
		require.ErrorIs(t, err, x.want, x.name)
		var e *memflash.Error
		require.ErrorAs(t, err, &e, x.name)
		if first == nil {
			first = err
		}
	}
	require.Equal(t, first, c.Err())
	require.Zero(t, c.Stats(), "refused operations count")
	require.NoError(t, e.Erase(8192, 0))
	write(t, f, nil, 8192)
	require.Zero(t, c.Ops())
}

func TestBadConfig(t *testing.T) {
	for _, cfg := range []memflash.Config{
		{Size: -1},
		{Size: memflash.MaxSize + 1},
		{Size: 4096, EraseSize: -1},
		{Size: 4096, WriteSize: -1},
		{Size: 4096, EraseSize: 4096, EraseLimit: -1},
		{Size: 4096, EraseSize: 4096, EraseUnits: []int64{4096}},
		{Size: 4096, EraseUnits: []int64{4096, 4096}},
		{Size: 4096, EraseUnits: []int64{4096, 0}},
		{EraseUnits: []int64{}},
		{EraseUnits: []int64{1 << 62, 1 << 62, 1 << 62}},
		{EraseUnits: []int64{4096, 4100}, WriteSize: 8},
		{Size: 4100, WriteSize: 8},
		{Size: 4096, EraseSize: 1020, WriteSize: 8},
		{Size: memflash.MaxSize, EraseSize: 1},
	} {
		f := memflash.New(cfg)
		require.Zero(t, f.Size())
		_, err := f.WriteAt([]byte{1}, 0)
		require.ErrorIs(t, err, ota.ErrInvalid, "%+v", cfg)
		_, err = f.ReadAt([]byte{1}, 0)
		require.ErrorIs(t, err, ota.ErrInvalid)
		require.ErrorIs(t, f.Sync(), ota.ErrInvalid)
		c := memflash.NewChip(memflash.Config{Size: 1}, cfg)
		require.ErrorIs(t, c.Err(), ota.ErrInvalid)
	}
}

var geometries = map[string]memflash.Config{
	"plain":       {Size: 20000},
	"sectors":     {Size: 20480, WriteSize: 512},
	"4K":          {Size: 20480, EraseSize: 4096},
	"short last":  {Size: 10240, EraseSize: 4096, WriteSize: 8},
	"512":         {Size: 8192, EraseSize: 512, WriteSize: 8},
	"mixed":       {EraseUnits: []int64{16 << 10, 16 << 10, 64 << 10, 128 << 10}, WriteSize: 256},
	"192K":        {Size: 384 << 10, EraseSize: 192 << 10, WriteSize: 3072},
	"erased zero": {Size: 20480, EraseSize: 4096, WriteSize: 4, ErasedZero: true},
	"rewrite":     {Size: 20480, EraseSize: 4096, Rewrite: true},
}

// Any sequence of right calls must give what a simple model gives.
func TestAgainstModel(t *testing.T) {
	for name, cfg := range geometries {
		for _, cached := range []bool{false, true} {
			cfg.Unsynced = cached
			t.Run(fmt.Sprint(name, " ", cached), func(t *testing.T) {
				c, f := one(cfg)
				rng := rand.New(rand.NewPCG(7, 7))
				ws := ota.WriteSize(f)
				want := read(t, f)
				e, erases := f.(ota.Eraser)
				if erases {
					require.Equal(t, fill([]byte{ota.ErasedByte(f)}, int(f.Size())), want)
				}
				for i := range uint64(150) {
					off := rng.Int64N(f.Size())
					switch rng.IntN(8) {
					case 0:
						require.NoError(t, f.Sync())
						continue
					case 1: // continue on a clone
						c = c.Clone()
						old := f
						f = c.Flashes()[0]
						e, _ = f.(ota.Eraser)
						if !erases { // what happens to the original must not matter
							write(t, old, pattern(i, int(ws)), 0)
						}
						continue
					}
					if !erases {
						off -= off % ws
						p := pattern(i, int(min(f.Size()-off, (1+rng.Int64N(10))*ws)))
						write(t, f, p, off)
						copy(want[off:], p)
						continue
					}
					start, n := ota.EraseUnit(f, off)
					require.NoError(t, e.Erase(start, n))
					copy(want[start:start+n], fill([]byte{ota.ErasedByte(f)}, int(n)))
					from := rng.Int64N(n/ws) * ws
					p := pattern(i, int(n-from))
					write(t, f, p, start+from)
					copy(want[start+from:], p)
				}
				require.True(t, bytes.Equal(want, read(t, f)))
				require.True(t, bytes.Equal(want, peek(t, c, 0)))
				require.NoError(t, f.Sync())
				c.PowerOff(memflash.LoseAll, 0)
				c.PowerOn()
				require.True(t, bytes.Equal(want, read(t, f)))
				require.NoError(t, c.Err())
			})
		}
	}
}

func TestEraseUnits(t *testing.T) {
	c, f := one(memflash.Config{EraseUnits: []int64{16 << 10, 8 << 10, 64 << 10, 2 << 10}})
	require.EqualValues(t, 90<<10, f.Size())
	require.EqualValues(t, 64<<10, f.(ota.Eraser).EraseSize())
	for _, u := range [][3]int64{{0, 0, 16}, {16<<10 - 1, 0, 16}, {16 << 10, 16, 8}, {24 << 10, 24, 64}, {88<<10 - 1, 24, 64}, {88 << 10, 88, 2}, {90<<10 - 1, 88, 2}} {
		start, n := ota.EraseUnit(f, u[0])
		require.Equal(t, [2]int64{u[1] << 10, u[2] << 10}, [2]int64{start, n})
	}
	erase(t, f, 16<<10, 72<<10)
	erase(t, f, 88<<10, 2<<10)
	erase(t, f, 88<<10, 2<<10)
	require.Equal(t, []int{0, 1, 1, 2}, c.Wear(0))
	require.Equal(t, 4, c.Ops())
	require.Nil(t, c.Wear(1))
	require.Nil(t, c.Wear(-1))
	r, err := ota.Region(f, 16<<10, 72<<10)
	require.NoError(t, err)
	start, n := ota.EraseUnit(r, 8<<10)
	require.Equal(t, [2]int64{8 << 10, 64 << 10}, [2]int64{start, n})
}

func TestWriteOnce(t *testing.T) {
	for _, erased := range []bool{false, true} {
		c, f := one(memflash.Config{Size: 8192, EraseSize: 4096, WriteSize: 8, ErasedZero: erased})
		blank := fill([]byte{ota.ErasedByte(f)}, 8)
		write(t, f, blank, 64) // counts, although nothing changes
		write(t, f, pattern(1, 8), 4092-4)
		for _, w := range []struct{ off, n int64 }{{64, 8}, {56, 16}, {64, 16}, {0, 8192}, {4088, 8}, {4080, 24}} {
			before := read(t, f)
			n, err := f.WriteAt(fill(blank, int(w.n/8)), w.off)
			require.ErrorIs(t, err, memflash.ErrNotErased, "%v", w)
			require.Zero(t, n)
			require.Equal(t, before, read(t, f))
		}
		require.ErrorIs(t, c.Err(), memflash.ErrNotErased)
		for _, w := range []struct{ off, n int64 }{{56, 8}, {72, 8}, {4096, 8}, {4080, 8}} {
			write(t, f, pattern(2, int(w.n)), w.off)
		}
		erase(t, f, 0, 4096)
		write(t, f, pattern(3, 4096), 0)
		_, err := f.WriteAt(blank, 4096)
		require.ErrorIs(t, err, memflash.ErrNotErased, "the other unit was not erased")
	}
}

func TestRewrite(t *testing.T) {
	_, f := one(memflash.Config{Size: 4096, EraseSize: 4096, Rewrite: true})
	write(t, f, []byte{0xff, 0xf0, 0x0f}, 0)
	write(t, f, []byte{0x7f, 0x80, 0x0f}, 0)
	_, err := f.WriteAt([]byte{0x7f, 0x80, 0x1f}, 0)
	require.ErrorIs(t, err, memflash.ErrNotErased)
	require.Equal(t, []byte{0x7f, 0x80, 0x0f, 0xff}, read(t, f)[:4])

	_, f = one(memflash.Config{Size: 4096, EraseSize: 4096, Rewrite: true, ErasedZero: true})
	write(t, f, []byte{0x01}, 0)
	write(t, f, []byte{0x03}, 0)
	_, err = f.WriteAt([]byte{0x02}, 0)
	require.ErrorIs(t, err, memflash.ErrNotErased)
	require.Equal(t, []byte{3, 0}, read(t, f)[:2])
}

func TestEraseLimit(t *testing.T) {
	c, f := one(memflash.Config{Size: 8192, EraseSize: 4096, EraseLimit: 2})
	erase(t, f, 0, 4096)
	erase(t, f, 0, 4096)
	write(t, f, []byte("stays"), 0)
	require.ErrorIs(t, f.(ota.Eraser).Erase(0, 4096), memflash.ErrWorn)
	require.Equal(t, "stays", string(read(t, f)[:5]))
	erase(t, f, 4096, 4096)
	require.Equal(t, []int{2, 1}, c.Wear(0))
	require.NoError(t, c.Err(), "wear is no misuse")
}

// One chip: one numbering, one power supply.
func TestChip(t *testing.T) {
	c := memflash.NewChip(memflash.Config{Size: 4096}, memflash.Config{Size: 8192, EraseSize: 4096})
	fs := c.Flashes()
	var ops []memflash.Op
	c.OnOp(func(op memflash.Op) { ops = append(ops, op) })
	write(t, fs[0], []byte("abc"), 1)
	read(t, fs[0])
	erase(t, fs[1], 0, 8192)
	require.NoError(t, fs[1].Sync())
	read(t, fs[1])
	require.Equal(t, []memflash.Op{
		{Index: 0, Kind: memflash.OpWrite, Flash: 0, Off: 1, Len: 3},
		{Index: 0, Kind: memflash.OpRead, Flash: 0, Off: 0, Len: 4096},
		{Index: 1, Kind: memflash.OpErase, Flash: 1, Off: 0, Len: 4096},
		{Index: 2, Kind: memflash.OpErase, Flash: 1, Off: 4096, Len: 4096},
		{Index: 3, Kind: memflash.OpSync, Flash: 1},
		{Index: 1, Kind: memflash.OpRead, Flash: 1, Off: 0, Len: 8192},
	}, ops)
	require.Equal(t, memflash.Stats{Ops: 4, Reads: 2, BytesRead: 12288, BytesWritten: 3, BytesErased: 8192}, c.Stats())

	c.OnOp(nil)
	c.PowerOff(memflash.LoseNone, 0)
	for _, f := range fs {
		_, err := f.ReadAt(make([]byte, 1), 0)
		require.ErrorIs(t, err, memflash.ErrPowerOff)
		_, err = f.WriteAt(make([]byte, 1), 0)
		require.ErrorIs(t, err, memflash.ErrPowerOff)
		require.ErrorIs(t, f.Sync(), memflash.ErrPowerOff)
	}
	require.ErrorIs(t, fs[1].(ota.Eraser).Erase(0, 4096), memflash.ErrPowerOff)
	require.Equal(t, 4, c.Ops(), "nothing happens without power")
	require.Len(t, ops, 6)
	_, err := c.Clone().Flashes()[0].ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, memflash.ErrPowerOff)

	c.PowerOn()
	read(t, fs[0])
	d := c.Clone()
	require.True(t, c.Equal(d))
	require.Zero(t, d.Stats())
	require.Equal(t, []int{1, 1}, d.Wear(1))
	write(t, d.Flashes()[0], []byte("x"), 0)
	require.False(t, c.Equal(d))
	require.False(t, c.Equal(memflash.NewChip()))
	write(t, fs[0], []byte("x"), 0)
	require.True(t, c.Equal(d))
}

func TestErrorText(t *testing.T) {
	c, f := one(memflash.Config{Size: 4096, EraseSize: 4096})
	_, err := f.WriteAt(make([]byte, 5), 4095)
	require.EqualError(t, err, "memflash: flash 0: write of 5 bytes at 4095: too large")
	c.Plan(memflash.Fault{Kind: memflash.Fail})
	require.EqualError(t, f.Sync(), "memflash: flash 0: sync: injected fault")
	require.Equal(t, "write|erase|sync|read", (memflash.OpWrite | memflash.OpErase | memflash.OpSync | memflash.OpRead).String())
}

// Every way to tear a write leaves what it says, and the same for the same seed.
func TestTearWrite(t *testing.T) {
	for _, cfg := range []memflash.Config{
		{Size: 8192},
		{Size: 8192, EraseSize: 8192, WriteSize: 8},
		{Size: 8192, EraseSize: 8192, WriteSize: 8, ErasedZero: true},
		{Size: 8192, Unsynced: true},
	} {
		base, f := one(cfg)
		old := read(t, f)
		data := pattern(1, 4000)
		full := bytes.Clone(old)
		copy(full[200:], data)
		weakened := 0
		prefixes := map[int]bool{}
		for seed := range uint64(20) {
			for _, fault := range memflash.TearModes(seed) {
				run := func() *memflash.Chip {
					c := base.Clone()
					c.Plan(fault)
					f := c.Flashes()[0]
					n, err := f.WriteAt(data, 200)
					require.ErrorIs(t, err, memflash.ErrPowerOff)
					require.Zero(t, n)
					require.Zero(t, c.Pending())
					c.PowerOn()
					return c
				}
				c := run()
				require.True(t, c.Equal(run()), "%+v", fault)
				got := peek(t, c, 0)
				require.Equal(t, old[:200], got[:200])
				require.Equal(t, old[4200:], got[4200:])
				kept := !cfg.Unsynced || fault.Loss == memflash.LoseNone
				switch {
				case fault.Kind == memflash.CutBefore, cfg.Unsynced && fault.Loss == memflash.LoseAll:
					require.Equal(t, old, got)
				case fault.Kind == memflash.CutAfter && kept:
					require.Equal(t, full, got)
				case fault.Kind == memflash.CutPrefix:
					n := 200
					for n < 4200 && got[n] == full[n] {
						n++
					}
					require.Equal(t, old[n:], got[n:])
					prefixes[n] = true
				case fault.Kind == memflash.CutBits && kept:
					require.NotEqual(t, old, got)
					require.NotEqual(t, full, got)
					strange := byte(0)
					for i := range got {
						strange |= (got[i] ^ old[i]) &^ (full[i] ^ old[i])
					}
					require.Zero(t, strange, "a bit that does not change has changed")
				case fault.Kind == memflash.CutWeak:
					require.Equal(t, full, got)
					for range 64 {
						if !bytes.Equal(full, read(t, c.Flashes()[0])) {
							weakened++
							break
						}
					}
				}
			}
		}
		require.Equal(t, 20, weakened, "seeds whose weak bits show")
		require.Greater(t, len(prefixes), 15)
	}
}

func TestTearWriteAtGivenByte(t *testing.T) {
	base := memflash.NewChip(memflash.Config{Size: 4096, EraseSize: 4096, WriteSize: 8})
	data := pattern(5, 64)
	for n := int64(1); n <= 64; n++ {
		c := base.Clone()
		c.Plan(memflash.Fault{Kind: memflash.CutPrefix, N: n})
		f := c.Flashes()[0]
		_, err := f.WriteAt(data, 8)
		require.ErrorIs(t, err, memflash.ErrPowerOff)
		c.PowerOn()
		got := read(t, f)[8:72]
		require.Equal(t, data[:n], got[:n])
		require.Equal(t, fill([]byte{0xff}, int(64-n)), got[n:])
		// The unit that was torn cannot be written any more, the next one can.
		next := (n + 7) / 8 * 8
		_, err = f.WriteAt(data[:8], next)
		require.ErrorIs(t, err, memflash.ErrNotErased)
		write(t, f, data[:8], 8+next)
	}
}

func TestTearErase(t *testing.T) {
	for _, cfg := range []memflash.Config{
		{Size: 12288, EraseSize: 4096},
		{Size: 12288, EraseSize: 4096, ErasedZero: true},
		{Size: 3072, EraseSize: 1024, WriteSize: 8},
	} {
		base, f := one(cfg)
		u := int(cfg.EraseSize)
		old := pattern(3, 3*u)
		write(t, f, old, 0)
		blank := fill([]byte{ota.ErasedByte(f)}, u)
		for seed := range uint64(20) {
			for _, fault := range memflash.TearModes(seed) {
				fault.At = 1 // the second unit
				c := base.Clone()
				c.Plan(fault)
				f := c.Flashes()[0]
				require.ErrorIs(t, f.(ota.Eraser).Erase(0, int64(3*u)), memflash.ErrPowerOff)
				require.Equal(t, 2, c.Ops())
				c.PowerOn()
				got := peek(t, c, 0)
				require.Equal(t, blank, got[:u])
				require.Equal(t, old[2*u:], got[2*u:])
				mid := got[u : 2*u]
				switch fault.Kind {
				case memflash.CutBefore:
					require.Equal(t, old[u:2*u], mid)
					require.Equal(t, 0, c.Wear(0)[1])
				case memflash.CutAfter:
					require.Equal(t, blank, mid)
				default:
					require.Equal(t, 1, c.Wear(0)[1])
					_, err := f.WriteAt(pattern(1, 8), int64(2*u-8))
					require.ErrorIs(t, err, memflash.ErrNotErased, "an erase cut short must be repeated")
				}
				erase(t, f, int64(u), int64(u))
				require.Equal(t, blank, read(t, f)[u:2*u], "erasing heals")
				write(t, f, pattern(1, u), int64(u))
			}
		}
	}
}

func TestWeakBits(t *testing.T) {
	c, f := one(memflash.Config{Size: 8192})
	write(t, f, fill([]byte{0x55}, 8192), 0)
	require.NoError(t, c.WeakBit(0, 5000, 7))
	require.NoError(t, c.WeakBit(0, 5000, 0))
	seen := func(f ota.Flash) map[byte]int {
		m := map[byte]int{}
		for range 400 {
			b := read(t, f)
			m[b[5000]]++
			b[5000] = 0x55
			require.Equal(t, fill([]byte{0x55}, 8192), b)
		}
		return m
	}
	m := seen(f)
	require.Len(t, m, 4)
	for v, n := range m {
		require.Contains(t, []byte{0x55, 0x54, 0xd5, 0xd4}, v)
		require.Greater(t, n, 50)
	}
	c.PowerOff(memflash.LoseAll, 1)
	c.PowerOn()
	require.Len(t, seen(f), 4, "power does not heal")
	d := c.Clone()
	require.Len(t, seen(d.Flashes()[0]), 4)

	write(t, f, []byte{0x55}, 5001)
	require.Len(t, seen(f), 4)
	write(t, f, []byte{0x55}, 5000)
	require.Len(t, seen(f), 1)
	require.Len(t, seen(d.Flashes()[0]), 4, "healed in the copy, too")
	write(t, d.Flashes()[0], fill([]byte{0x55}, 8192), 0)
	require.Len(t, seen(d.Flashes()[0]), 1)
}

// A few weak bits let data read well now and then; that is what makes them
// dangerous.
func TestWeakCount(t *testing.T) {
	base := memflash.NewChip(memflash.Config{Size: 4096})
	data := pattern(9, 256)
	for _, n := range []int64{1, 3} {
		good, flipped := 0, 0
		for seed := range uint64(200) {
			c := base.Clone()
			c.Plan(memflash.Fault{Kind: memflash.CutWeak, N: n, Seed: seed})
			f := c.Flashes()[0]
			_, err := f.WriteAt(data, 0)
			require.ErrorIs(t, err, memflash.ErrPowerOff)
			c.PowerOn()
			wrong := 0
			for i, b := range read(t, f)[:256] {
				wrong += bits.OnesCount8(b ^ data[i])
			}
			require.LessOrEqual(t, wrong, int(n))
			if wrong == 0 {
				good++
			} else {
				flipped++
			}
		}
		require.Positive(t, good)
		require.Positive(t, flipped)
	}
}

func TestPairs(t *testing.T) {
	c, f := one(memflash.Config{Size: 4096})
	c.Plan(memflash.Fault{At: 1}, memflash.Fault{At: 3, Kind: memflash.CutAfter})
	write(t, f, []byte("a"), 0)
	_, err := f.WriteAt([]byte("b"), 0)
	require.ErrorIs(t, err, memflash.ErrPowerOff)
	require.Equal(t, 1, c.Pending())
	c.PowerOn()
	write(t, f, []byte("c"), 1)
	_, err = f.WriteAt([]byte("d"), 2)
	require.ErrorIs(t, err, memflash.ErrPowerOff)
	c.PowerOn()
	require.Equal(t, "acd\x00", string(read(t, f)[:4]))
	require.Zero(t, c.Pending())
	require.Equal(t, 4, c.Ops())
}

func TestMatching(t *testing.T) {
	fail := memflash.Fault{Kind: memflash.Fail}
	with := func(fn func(*memflash.Fault)) memflash.Fault { f := fail; fn(&f); return f }
	for name, x := range map[string]struct {
		fault memflash.Fault
		want  string // of: write 0@0, write 0@100, write 1@0, erase 1, sync 1, read 0, read 0@100
	}{
		"first":         {fail, "X......"},
		"later":         {with(func(f *memflash.Fault) { f.At = 2 }), "..X...."},
		"for ever":      {with(func(f *memflash.Fault) { f.At = 1; f.Forever = true }), ".XXXX.."},
		"erase":         {with(func(f *memflash.Fault) { f.On = memflash.OpErase }), "...X..."},
		"sync":          {with(func(f *memflash.Fault) { f.On = memflash.OpSync }), "....X.."},
		"read":          {with(func(f *memflash.Fault) { f.On = memflash.OpRead }), ".....X."},
		"second read":   {with(func(f *memflash.Fault) { f.On = memflash.OpRead; f.At = 1 }), "......X"},
		"range":         {with(func(f *memflash.Fault) { f.Off = 109; f.Len = 50 }), ".X....."},
		"beside":        {with(func(f *memflash.Fault) { f.Off = 110; f.Len = 50; f.Forever = true }), "......."},
		"other flash":   {with(func(f *memflash.Fault) { f.Flash = 1; f.Len = 1; f.Forever = true }), "..XX..."},
		"reads forever": {with(func(f *memflash.Fault) { f.On = memflash.OpRead; f.Forever = true }), ".....XX"},
		"not yet":       {with(func(f *memflash.Fault) { f.At = 5 }), "......."},
	} {
		t.Run(name, func(t *testing.T) {
			c := memflash.NewChip(memflash.Config{Size: 4096}, memflash.Config{Size: 4096, EraseSize: 4096})
			fs := c.Flashes()
			c.Plan(x.fault)
			b := make([]byte, 10)
			got := ""
			for _, err := range []error{
				second(fs[0].WriteAt(b, 0)),
				second(fs[0].WriteAt(b, 100)),
				second(fs[1].WriteAt(b, 0)),
				fs[1].(ota.Eraser).Erase(0, 4096),
				fs[1].Sync(),
				second(fs[0].ReadAt(b, 0)),
				second(fs[0].ReadAt(b, 100)),
			} {
				if err == nil {
					got += "."
					continue
				}
				require.ErrorIs(t, err, memflash.ErrFault)
				got += "X"
			}
			require.Equal(t, x.want, got)
			require.NoError(t, c.Err())
		})
	}
}

func second(_ int, err error) error { return err }

func TestFail(t *testing.T) {
	c, f := one(memflash.Config{Size: 8192, EraseSize: 4096})
	c.Plan(memflash.Fault{Kind: memflash.Fail, N: 3})
	n, err := f.WriteAt([]byte("abcdef"), 0)
	require.ErrorIs(t, err, memflash.ErrFault)
	require.Equal(t, 3, n)
	require.Equal(t, "abc\xff", string(read(t, f)[:4]))

	c.Plan(memflash.Fault{Kind: memflash.Fail, At: 2})
	require.ErrorIs(t, f.(ota.Eraser).Erase(0, 8192), memflash.ErrFault)
	require.Equal(t, []int{1, 0}, c.Wear(0))

	c.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead})
	n, err = f.ReadAt(make([]byte, 5), 0)
	require.ErrorIs(t, err, memflash.ErrFault)
	require.Zero(t, n)
	read(t, f)
}

func TestSkip(t *testing.T) {
	// A skipped write: what was written is not there, but counts as written.
	c, f := one(memflash.Config{Size: 8192, EraseSize: 4096})
	c.Plan(memflash.Fault{Kind: memflash.Skip})
	write(t, f, []byte("lost"), 0)
	require.Equal(t, fill([]byte{0xff}, 8192), read(t, f))
	_, err := f.WriteAt([]byte("x"), 2)
	require.ErrorIs(t, err, memflash.ErrNotErased)

	// A skipped erase: the next write mixes with what is still there.
	erase(t, f, 0, 4096)
	write(t, f, []byte{0xf0}, 0)
	c.Plan(memflash.Fault{Kind: memflash.Skip, On: memflash.OpErase})
	erase(t, f, 0, 4096)
	require.Equal(t, byte(0xf0), read(t, f)[0])
	write(t, f, []byte{0x3c}, 0)
	require.Equal(t, byte(0x30), read(t, f)[0])

	// A skipped read leaves the buffer alone.
	c.Plan(memflash.Fault{Kind: memflash.Skip, On: memflash.OpRead})
	b := []byte("stale")
	n, err := f.ReadAt(b, 0)
	require.NoError(t, err)
	require.Equal(t, 5, n)
	require.Equal(t, "stale", string(b))
	b = make([]byte, 9000)
	c.Plan(memflash.Fault{Kind: memflash.Skip, On: memflash.OpRead})
	n, err = f.ReadAt(b, 0)
	require.Equal(t, io.EOF, err)
	require.Equal(t, 8192, n)

	// A skipped sync saves nothing.
	c, f = one(memflash.Config{Size: 4096, Unsynced: true})
	c.Plan(memflash.Fault{Kind: memflash.Skip, On: memflash.OpSync})
	write(t, f, []byte("lost"), 0)
	require.NoError(t, f.Sync())
	c.PowerOff(memflash.LoseAll, 0)
	c.PowerOn()
	require.Equal(t, make([]byte, 4096), read(t, f))
}

func TestMisdirect(t *testing.T) {
	data := pattern(1, 16)
	for seed := range uint64(20) {
		c, f := one(memflash.Config{Size: 16384, EraseSize: 4096, WriteSize: 16})
		c.Plan(memflash.Fault{Kind: memflash.Misdirect, Seed: seed})
		write(t, f, data, 32)
		got := read(t, f)
		at := bytes.Index(got, data)
		require.NotEqual(t, -1, at)
		require.NotEqual(t, 32, at)
		require.Zero(t, at%16)
		_, err := f.WriteAt(data, 32)
		require.ErrorIs(t, err, memflash.ErrNotErased)

		write(t, f, data, 4096*3)
		c.Plan(memflash.Fault{Kind: memflash.Misdirect, Seed: seed, N: 4096*3 + 100})
		erase(t, f, 0, 4096)
		require.Equal(t, fill([]byte{0xff}, 4096), read(t, f)[4096*3:])
	}
	c, f := one(memflash.Config{Size: 4096})
	write(t, f, data, 1000)
	c.Plan(memflash.Fault{Kind: memflash.Misdirect, On: memflash.OpRead, N: 1000},
		memflash.Fault{Kind: memflash.Misdirect, On: memflash.OpSync})
	b := make([]byte, 16)
	_, err := f.ReadAt(b, 0)
	require.NoError(t, err)
	require.Equal(t, data, b)
	require.NoError(t, f.Sync())

	// With nowhere else to go, the operation is lost.
	c, f = one(memflash.Config{Size: 16, EraseSize: 16, WriteSize: 16})
	c.Plan(memflash.Fault{Kind: memflash.Misdirect, Forever: true})
	write(t, f, data, 0)
	erase(t, f, 0, 16)
	require.Equal(t, fill([]byte{0xff}, 16), read(t, f))
}

func TestFlip(t *testing.T) {
	for _, cfg := range []memflash.Config{{Size: 8192}, {Size: 8192, Unsynced: true}, {Size: 8192, EraseSize: 4096}} {
		c, f := one(cfg)
		write(t, f, fill([]byte{0x0f}, 8192), 0)
		require.NoError(t, c.FlipBit(0, 8191, 7))
		require.Equal(t, byte(0x8f), read(t, f)[8191])
		c.PowerOff(memflash.LoseAll, 0)
		c.PowerOn()
		if cfg.Unsynced {
			require.Equal(t, byte(0x80), read(t, f)[8191], "the write is lost, the flip is not")
			continue
		}
		require.Equal(t, byte(0x8f), read(t, f)[8191])
		require.NoError(t, c.FlipBit(0, 8191, 7))

		// Read disturb: the third read changes a bit for good, where told.
		c.Plan(memflash.Fault{Kind: memflash.Flip, On: memflash.OpRead, At: c.Stats().Reads + 2, Off: 100, Len: 50})
		for i := range 4 {
			wrong, at := 0, 0
			for k, b := range read(t, f) {
				if b != 0x0f {
					wrong, at = wrong+bits.OnesCount8(b^0x0f), k
				}
			}
			if i < 2 {
				require.Zero(t, wrong)
				continue
			}
			require.Equal(t, 1, wrong)
			require.True(t, at >= 100 && at < 150)
		}
	}
	c, f := one(memflash.Config{Size: 100})
	c.Plan(memflash.Fault{Kind: memflash.Flip, On: memflash.OpSync, N: 5})
	require.NoError(t, f.Sync(), "a sync has no bytes to flip")
	require.Equal(t, make([]byte, 100), read(t, f))
}

func TestPokePeek(t *testing.T) {
	for _, cfg := range []memflash.Config{{Size: 12288, EraseSize: 4096, WriteSize: 8}, {Size: 12288, EraseSize: 4096, WriteSize: 8, Unsynced: true}} {
		c, f := one(cfg)
		write(t, f, pattern(1, 8192), 0)
		require.NoError(t, f.Sync())
		p := pattern(2, 9001)
		require.NoError(t, c.Poke(0, p, 1))
		require.Equal(t, 2, c.Ops())
		c.PowerOff(memflash.LoseAll, 0)
		b := make([]byte, 9001)
		require.NoError(t, c.Peek(0, b, 1))
		require.Equal(t, p, b)
		c.PowerOn()
		require.Equal(t, p, read(t, f)[1:9002])
		_, err := f.WriteAt(p[:8], 8192)
		require.ErrorIs(t, err, memflash.ErrNotErased)
	}
	c := memflash.NewChip(memflash.Config{Size: 10})
	for _, err := range []error{
		c.FlipBit(1, 0, 0), c.FlipBit(-1, 0, 0), c.FlipBit(0, 10, 0), c.FlipBit(0, -1, 0),
		c.WeakBit(0, 10, 0), c.Peek(0, make([]byte, 11), 0), c.Poke(0, make([]byte, 2), 9),
	} {
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
}

func TestLosses(t *testing.T) {
	base, f := one(memflash.Config{Size: 8192, Unsynced: true})
	write(t, f, fill([]byte{'s'}, 8192), 0)
	require.NoError(t, f.Sync())
	for i := range int64(4) {
		write(t, f, fill([]byte{byte('0' + i)}, 2048), i*2048)
	}
	run := func(l memflash.Loss, seed uint64) string {
		c := base.Clone()
		f := c.Flashes()[0]
		require.Equal(t, byte('0'), read(t, f)[0], "the cache is read")
		c.PowerOff(l, seed)
		c.PowerOn()
		once := read(t, f)
		c.PowerOff(memflash.LoseAll, seed)
		c.PowerOn()
		require.Equal(t, once, read(t, f), "lost once, lost for good; saved once, saved for good")
		s := ""
		for off := 0; off < 8192; off += 512 {
			require.Equal(t, fill(once[off:off+1], 512), once[off:off+512])
			s += string(once[off])
		}
		return s
	}
	require.Equal(t, "ssssssssssssssss", run(memflash.LoseAll, 1))
	require.Equal(t, "0000111122223333", run(memflash.LoseNone, 1))
	results := map[string]bool{}
	reordered := false
	for seed := range uint64(100) {
		s := run(memflash.LoseSome, seed)
		require.Equal(t, s, run(memflash.LoseSome, seed))
		for i, b := range []byte(s) {
			require.Contains(t, []byte{'s', "0000111122223333"[i]}, b)
		}
		results[s] = true
		reordered = reordered || s[0] == 's' && s[12] == '3'
	}
	require.Greater(t, len(results), 50)
	require.True(t, reordered, "a later write without an earlier one")
}

func TestLostErase(t *testing.T) {
	base, f := one(memflash.Config{Size: 4096, EraseSize: 4096, Unsynced: true})
	write(t, f, []byte{0xf0}, 0)
	require.NoError(t, f.Sync())
	erase(t, f, 0, 4096)
	write(t, f, []byte{0x3c}, 0)
	seen := map[byte]bool{}
	for seed := range uint64(60) {
		c := base.Clone()
		c.PowerOff(memflash.LoseSome, seed)
		c.PowerOn()
		seen[read(t, c.Flashes()[0])[0]] = true
	}
	require.Equal(t, map[byte]bool{0xf0: true, 0xff: true, 0x3c: true, 0x30: true}, seen)
}

func TestFailedSync(t *testing.T) {
	for loss, want := range map[memflash.Loss]string{memflash.LoseNone: "new", memflash.LoseAll: "old"} {
		c, f := one(memflash.Config{Size: 4096, Unsynced: true})
		write(t, f, []byte("old"), 0)
		require.NoError(t, f.Sync())
		c.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpSync, Loss: loss})
		write(t, f, []byte("new"), 0)
		require.ErrorIs(t, f.Sync(), memflash.ErrFault)
		require.Equal(t, "new", string(read(t, f)[:3]), "the cache keeps it")
		require.NoError(t, f.Sync())
		c.PowerOff(memflash.LoseNone, 0)
		c.PowerOn()
		require.Equal(t, want, string(read(t, f)[:3]))
	}
	seen := map[string]bool{}
	for seed := range uint64(40) {
		c, f := one(memflash.Config{Size: 8192, Unsynced: true})
		c.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpSync, Loss: memflash.LoseSome, Seed: seed})
		write(t, f, []byte("a"), 0)
		write(t, f, []byte("b"), 4096)
		require.ErrorIs(t, f.Sync(), memflash.ErrFault)
		require.NoError(t, f.Sync())
		c.PowerOff(memflash.LoseNone, 0)
		c.PowerOn()
		b := read(t, f)
		seen[string([]byte{b[0], b[4096]})] = true
	}
	require.Len(t, seen, 4)
}

func TestCutSync(t *testing.T) {
	for _, fault := range memflash.TearModes(1) {
		c := memflash.NewChip(memflash.Config{Size: 4096, Unsynced: true}, memflash.Config{Size: 4096, Unsynced: true})
		f, g := c.Flashes()[0], c.Flashes()[1]
		write(t, f, []byte("f"), 0)
		write(t, g, []byte("g"), 0)
		fault.On = memflash.OpSync
		fault.Loss = memflash.LoseAll
		c.Plan(fault)
		require.ErrorIs(t, f.Sync(), memflash.ErrPowerOff)
		c.PowerOn()
		want := byte(0)
		if fault.Kind == memflash.CutAfter {
			want = 'f'
		}
		require.Equal(t, want, read(t, f)[0])
		require.Zero(t, read(t, g)[0], "a sync saves its own flash only")
	}
}

func TestCutRead(t *testing.T) {
	c, f := one(memflash.Config{Size: 4096})
	c.Plan(memflash.Fault{On: memflash.OpRead, At: 1})
	read(t, f)
	n, err := f.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, memflash.ErrPowerOff)
	require.Zero(t, n)
	require.ErrorIs(t, f.Sync(), memflash.ErrPowerOff)
}

func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f := one(memflash.Config{Size: 4096})
		c.Plan(memflash.Fault{Kind: memflash.Slow, At: 1, Delay: 10 * time.Minute, Forever: true})
		start := time.Now()
		write(t, f, []byte("a"), 0)
		require.Zero(t, time.Since(start))
		write(t, f, []byte("b"), 0)
		require.NoError(t, f.Sync())
		require.Equal(t, 20*time.Minute, time.Since(start))

		// The power fails while an operation waits; others need not wait.
		done := make(chan error)
		go func() { done <- second(f.WriteAt([]byte("c"), 0)) }()
		synctest.Wait()
		require.Equal(t, byte('b'), read(t, f)[0])
		c.PowerOff(memflash.LoseNone, 0)
		require.ErrorIs(t, <-done, memflash.ErrPowerOff)
		c.PowerOn()
		require.Equal(t, byte('b'), read(t, f)[0])
	})
}

// The hook runs without any lock, and comes before the effect.
func TestOnOp(t *testing.T) {
	c, f := one(memflash.Config{Size: 4096})
	before := byte(0xee)
	c.OnOp(func(op memflash.Op) {
		if op.Kind != memflash.OpWrite {
			return
		}
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, 0); err == nil {
			before = b[0]
		}
		if op.Index == 1 {
			c.PowerOff(memflash.LoseNone, 0)
		}
	})
	write(t, f, []byte("x"), 0)
	require.Zero(t, before)
	_, err := f.WriteAt([]byte("y"), 0)
	require.ErrorIs(t, err, memflash.ErrPowerOff)
	require.Equal(t, byte('x'), before)
}

func TestConcurrent(t *testing.T) {
	c := memflash.NewChip(memflash.Config{Size: 64 << 10}, memflash.Config{Size: 64 << 10, EraseSize: 4096, Unsynced: true})
	var wg sync.WaitGroup
	for g := range int64(4) {
		for _, f := range c.Flashes() {
			wg.Go(func() {
				for i := range uint64(20) {
					off := g * 16 << 10
					if e, ok := f.(ota.Eraser); ok {
						if err := e.Erase(off, 4096); err != nil {
							t.Error(err)
						}
					}
					p := pattern(i, 4096)
					if _, err := f.WriteAt(p, off); err != nil {
						t.Error(err)
					}
					q := make([]byte, 4096)
					if _, err := f.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
						t.Error("read back:", err)
					}
					if err := f.Sync(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Go(func() { // clones are used beside their origin
			for range 20 {
				d := c.Clone()
				if _, err := d.Flashes()[0].WriteAt(pattern(9, 64<<10), 0); err != nil {
					t.Error(err)
				}
				d.Equal(c.Clone())
				c.Stats()
				c.Wear(1)
			}
		})
	}
	wg.Wait()
	require.NoError(t, c.Err())
}

func TestNoAllocs(t *testing.T) {
	for name, cfg := range geometries {
		_, f := one(cfg)
		b := pattern(1, int(f.Size()))
		e, erases := f.(ota.Eraser)
		var err error
		n := testing.AllocsPerRun(20, func() {
			if erases {
				err = errors.Join(err, e.Erase(0, f.Size()))
			}
			_, werr := f.WriteAt(b, 0)
			_, rerr := f.ReadAt(b, 0)
			err = errors.Join(err, werr, rerr, f.Sync())
		})
		require.NoError(t, err)
		require.Zero(t, n, name)
	}
}
