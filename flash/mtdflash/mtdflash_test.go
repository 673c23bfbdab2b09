package mtdflash

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flashtest"
)

// chip is a simulated MTD device. Like the kernel it lets a write to a bad block
// succeed, and a read with uncorrectable errors.
type chip struct {
	mu     sync.Mutex
	i      Info
	b      []byte
	isbad  map[int64]bool
	weak   map[int64]int  // erases that a block has left
	tired  map[int64]int  // writes that a block has left
	rotten map[int64]bool // blocks that read with errors
	failed uint32
	locked map[int64]bool
	nolock bool
	noecc  bool
	erased int
	wrote  map[int64]int // writes to each block
	shut   bool
}

func newChip(i Info) *chip {
	return &chip{i: i, b: bytes.Repeat([]byte{0xff}, int(i.Size)), isbad: map[int64]bool{}, weak: map[int64]int{}, tired: map[int64]int{},
		rotten: map[int64]bool{}, locked: map[int64]bool{}, wrote: map[int64]int{}}
}

const page, block = 64, 512

func nand(blocks int64, bad ...int64) *chip {
	c := newChip(Info{Kind: NAND, Size: blocks * block, EraseSize: block, WriteSize: page, Writable: true})
	for _, k := range bad {
		c.isbad[k*block] = true
	}
	return c
}

func (c *chip) block(off int64) int64 { return off - off%c.i.EraseSize }

func (c *chip) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := copy(p, c.b[off:])
	if c.rotten[c.block(off)] {
		c.failed++
		p[0] ^= 0x10
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (c *chip) WriteAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off%c.i.WriteSize != 0 || int64(len(p))%c.i.WriteSize != 0 {
		return 0, ota.ErrInvalid
	}
	k := c.block(off)
	if c.locked[k] {
		return 0, errIO
	}
	if n, ok := c.tired[k]; ok {
		if n == 0 {
			return 0, errIO
		}
		c.tired[k] = n - 1
	}
	c.wrote[k]++
	for i, v := range p {
		c.b[off+int64(i)] &= v
	}
	return len(p), nil
}

func (c *chip) info() (Info, error) { return c.i, nil }

func (c *chip) failures() (uint32, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.noecc {
		return 0, errNotSupported
	}
	return c.failed, nil
}

func (c *chip) erase(off, n int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off%c.i.EraseSize != 0 || n != c.i.EraseSize {
		return ota.ErrInvalid
	}
	if c.isbad[off] || c.locked[off] {
		return errIO
	}
	if left, ok := c.weak[off]; ok {
		if left == 0 {
			return errIO
		}
		c.weak[off] = left - 1
	}
	c.erased++
	for i := range n {
		c.b[off+i] = 0xff
	}
	return nil
}

func (c *chip) isBad(off int64) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.isbad[off], nil
}

func (c *chip) markBad(off int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.isbad[off] = true
	return nil
}

func (c *chip) isLocked(off, _ int64) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.nolock {
		return false, errNotSupported
	}
	return c.locked[off], nil
}

func (c *chip) lock(off, _ int64, locked bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.nolock && len(c.locked) == 0 {
		return errNotSupported
	}
	if c.locked[off] = locked; !locked {
		delete(c.locked, off)
	}
	return nil
}

func (c *chip) close() error { c.shut = true; return nil }

func open(t *testing.T, c *chip, o *Options) *Flash {
	if o == nil {
		o = &Options{}
	}
	f, err := newFlash(c, "sim", o)
	require.NoError(t, err)
	return f
}

func fill(n int64, seed byte) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func TestConformance(t *testing.T) {
	for name, tc := range map[string]struct {
		c *chip
		o Options
	}{
		"nand":         {nand(16, 0, 3, 4, 15), Options{Size: 8 * block}},
		"nand, whole":  {nand(100), Options{}},
		"nand, a part": {nand(32, 9, 12), Options{Offset: 8 * block, Length: 12 * block, Size: 10 * block}},
		"nor":          {newChip(Info{Kind: NOR, Size: 16 << 10, EraseSize: 4 << 10, WriteSize: 1, Writable: true}), Options{}},
		"dataflash":    {newChip(Info{Kind: DataFlash, Size: 528 * 10, EraseSize: 528, WriteSize: 528, Writable: true}), Options{}},
		"ram":          {newChip(Info{Kind: RAM, Size: 1 << 20, EraseSize: 64 << 10, WriteSize: 1, Writable: true}), Options{Length: 256 << 10}},
	} {
		before := maps.Clone(tc.c.isbad)
		f := open(t, tc.c, &tc.o)
		require.NoError(t, flashtest.Test(f), name)
		require.Equal(t, before, tc.c.isbad, name)
		for off := range before {
			require.Zero(t, tc.c.wrote[off], "a bad block was written")
		}
		require.NoError(t, f.Close())
		require.NoError(t, f.Close())
		require.True(t, tc.c.shut)
	}
}

// Byte 0 is in the first good block, and so on, inside the part.
func TestMapping(t *testing.T) {
	c := nand(10, 2, 3, 5)
	f := open(t, c, &Options{Offset: 2 * block, Length: 7 * block, Size: 3 * block})
	require.Equal(t, 1, f.Spare())
	data := fill(3*block, 1)
	require.NoError(t, f.Erase(0, f.Size()))
	_, err := f.WriteAt(data, 0)
	require.NoError(t, err)
	for i, k := range []int{4, 6, 7} {
		require.Equal(t, data[i*block:(i+1)*block], c.b[k*block:(k+1)*block])
	}
	for _, k := range []int64{0, 1, 2, 3, 5, 8, 9} {
		require.Zero(t, c.wrote[k*block])
	}
}

// A block that cannot be erased is marked and left out, and the rest moves up.
func TestWeakBlocks(t *testing.T) {
	c := nand(12, 1)
	c.weak[3*block] = 1
	c.weak[4*block] = 0
	f := open(t, c, &Options{Size: 6 * block})
	for round := range 3 {
		data := fill(6*block, byte(round))
		require.NoError(t, f.Erase(0, 6*block))
		for off := int64(0); off < 6*block; off += 2 * page {
			_, err := f.WriteAt(data[off:off+2*page], off)
			require.NoError(t, err)
		}
		// A reader that knows only the marks finds the same.
		for _, g := range []*Flash{f, open(t, c, &Options{Size: 6 * block, ReadOnly: true})} {
			got := make([]byte, len(data))
			_, err := g.ReadAt(got, 0)
			require.NoError(t, err)
			require.Equal(t, data, got, "round %d", round)
		}
	}
	require.Equal(t, map[int64]bool{1 * block: true, 3 * block: true, 4 * block: true}, c.isbad)
	require.Equal(t, 3, f.Spare())
}

// What was written behind a block that becomes bad is not silently elsewhere.
func TestMoved(t *testing.T) {
	c := nand(12)
	f := open(t, c, &Options{Size: 6 * block})
	require.NoError(t, f.Erase(0, 6*block))
	_, err := f.WriteAt(fill(block, 1), 4*block)
	require.NoError(t, err)
	c.weak[2*block] = 0
	require.ErrorIs(t, f.Erase(2*block, block), ErrMoved)
	require.NoError(t, f.Erase(2*block, block))
	// Nothing was written behind: fine.
	require.NoError(t, f.Erase(0, 6*block))
	c.weak[0] = 0
	require.NoError(t, f.Erase(0, block))
}

// A write that fails marks the block; a write never goes to a block that is bad by
// now.
func TestWriteFails(t *testing.T) {
	c := nand(12)
	f := open(t, c, &Options{Size: 6 * block})
	data := fill(6*block, 1)
	c.tired[2*block] = 1
	require.NoError(t, f.Erase(0, f.Size()))
	n, err := f.WriteAt(data[:2*block+page], 0)
	require.NoError(t, err)
	require.Equal(t, 2*block+page, n)
	n, err = f.WriteAt(data[2*block+page:], 2*block+page)
	require.ErrorIs(t, err, ErrBadBlock)
	require.ErrorIs(t, err, errIO)
	require.Zero(t, n)
	require.True(t, c.isbad[2*block])

	require.NoError(t, f.Erase(0, f.Size()))
	c.isbad[block] = true // by another program
	_, err = f.WriteAt(data, 0)
	require.ErrorIs(t, err, ErrBadBlock)
	require.Equal(t, 1, c.wrote[block], "the one of before")
	require.NoError(t, f.Erase(0, f.Size()))
	_, err = f.WriteAt(data, 0)
	require.NoError(t, err)
	got := make([]byte, len(data))
	_, err = open(t, c, &Options{Size: 6 * block}).ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, data, got)
}

// What lies behind the last good block is lost, and nothing else.
func TestWorn(t *testing.T) {
	c := nand(4)
	f := open(t, c, nil)
	require.EqualValues(t, 3*block, f.Size())
	data := fill(3*block, 1)
	require.NoError(t, f.Erase(0, f.Size()))
	_, err := f.WriteAt(data, 0)
	require.NoError(t, err)
	c.isbad[3*block], c.isbad[2*block] = true, true
	got := make([]byte, 3*block)
	for range 2 {
		f = open(t, c, nil)
		require.EqualValues(t, 3*block, f.Size())
		require.Equal(t, -1, f.Spare())
		n, err := f.ReadAt(got, 0)
		require.ErrorIs(t, err, ErrWorn)
		require.Equal(t, 2*block, n)
		require.Equal(t, data[:n], got[:n])
		require.ErrorIs(t, f.Erase(2*block, block), ErrWorn)
		_, err = f.WriteAt(data[:page], 2*block)
		require.ErrorIs(t, err, ErrWorn)
	}
	c.weak[0] = 0
	require.ErrorIs(t, f.Erase(0, 2*block), ErrWorn)
	require.Equal(t, -2, f.Spare())
	for _, g := range []*Flash{f, open(t, c, nil)} {
		n, err := g.ReadAt(got, 0)
		require.ErrorIs(t, err, ErrWorn)
		require.Equal(t, block, n, "every reader finds the same")
	}
	for n, want := range map[int64]int64{1: 1, 51: 1, 52: 2, 1024: 20, 4096: 80} {
		require.Equal(t, want, reserve(n))
	}
}

// The kernel's read succeeds where the error correction has failed.
func TestECC(t *testing.T) {
	c := nand(12)
	f := open(t, c, nil)
	require.NoError(t, f.Erase(0, f.Size()))
	c.rotten[2*block] = true
	p := make([]byte, 3*block)
	n, err := f.ReadAt(p, 0)
	require.ErrorIs(t, err, ErrECC)
	require.Equal(t, 2*block, n)
	n, err = f.ReadAt(p[:2*block], 0)
	require.NoError(t, err)
	require.Equal(t, 2*block, n)
	c.noecc = true
	_, err = f.ReadAt(p, 0)
	require.NoError(t, err)
}

// Protected blocks of NOR are unprotected when they are erased, and protected again.
func TestLocks(t *testing.T) {
	const es = 4096
	for _, cannotTell := range []bool{false, true} {
		c := newChip(Info{Kind: NOR, Size: 8 * es, EraseSize: es, WriteSize: 1, Writable: true})
		for k := range int64(8) {
			c.locked[k*es] = true
		}
		c.nolock = cannotTell
		f := open(t, c, nil)
		require.NoError(t, f.Erase(es, 2*es))
		_, err := f.WriteAt([]byte("hello"), 2*es+7)
		require.NoError(t, err)
		require.Len(t, c.locked, 6)
		require.NoError(t, f.Close())
		if cannotTell {
			require.Len(t, c.locked, 6)
		} else {
			require.Len(t, c.locked, 8)
		}
	}
	c := newChip(Info{Kind: NOR, Size: 8 * es, EraseSize: es, WriteSize: 1, Writable: true})
	c.nolock = true
	f := open(t, c, nil)
	require.NoError(t, f.Erase(0, es))
	require.NoError(t, f.Close())
}

func TestOptions(t *testing.T) {
	good := Info{Kind: NAND, Size: 16 * block, EraseSize: block, WriteSize: page, Writable: true}
	change := func(do func(*Info)) Info { i := good; do(&i); return i }
	for name, tc := range map[string]struct {
		i   Info
		o   Options
		err error
	}{
		"offset":     {good, Options{Offset: 1}, ota.ErrInvalid},
		"far":        {good, Options{Offset: 17 * block}, ota.ErrInvalid},
		"at end":     {good, Options{Offset: 16 * block}, ota.ErrInvalid},
		"long":       {good, Options{Offset: block, Length: 16 * block}, ota.ErrInvalid},
		"size":       {good, Options{Size: 17 * block}, ota.ErrInvalid},
		"odd size":   {good, Options{Size: block + 1}, nil},
		"odd length": {good, Options{Length: 2*block + 1, Size: 1}, nil},
		"too odd":    {good, Options{Length: block, Size: block + 1}, ota.ErrInvalid},
		"negative":   {good, Options{Size: -block}, ota.ErrInvalid},
		"tiny":       {good, Options{Length: block}, ota.ErrInvalid},
		"volume":     {change(func(i *Info) { i.Kind = UBIVolume }), Options{}, ota.ErrUnsupported},
		"rom":        {change(func(i *Info) { i.Kind, i.Writable = ROM, false }), Options{}, ota.ErrReadOnly},
		"no blocks":  {change(func(i *Info) { i.EraseSize = 0 }), Options{}, ota.ErrUnsupported},
		"odd pages":  {change(func(i *Info) { i.WriteSize = 100 }), Options{}, ota.ErrUnsupported},
		"no size":    {change(func(i *Info) { i.Size = 0 }), Options{}, ota.ErrUnsupported},
		"read a rom": {change(func(i *Info) { i.Kind, i.Writable = ROM, false }), Options{ReadOnly: true}, nil},
	} {
		_, err := newFlash(newChip(tc.i), "sim", &tc.o)
		require.ErrorIs(t, err, tc.err, name)
	}
	c := nand(16)
	f := open(t, c, &Options{ReadOnly: true})
	_, err := f.WriteAt(make([]byte, page), 0)
	require.ErrorIs(t, err, ota.ErrReadOnly)
	require.ErrorIs(t, f.Erase(0, block), ota.ErrReadOnly)
	_, err = Open(filepath.Join(t.TempDir(), "none"), nil)
	require.Error(t, err)
	for k, want := range map[Kind]string{NOR: "NOR", NAND: "NAND", 77: "kind 77"} {
		require.Equal(t, want, k.String())
	}
}

// Whatever blocks fail, an update that is repeated ends well as long as there are
// spare ones, and every reader agrees.
func TestRandomFaults(t *testing.T) {
	failures := 0
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		const blocks, size = 24, 12
		c := nand(blocks)
		for range 12 {
			k := r.Int64N(blocks) * block
			switch r.IntN(3) {
			case 0:
				c.isbad[k] = true
			case 1:
				c.weak[k] = r.IntN(4)
			case 2:
				c.tired[k] = r.IntN(20)
			}
		}
		f := open(t, c, &Options{Size: size * block})
		for round := range byte(4) {
			data := fill(size*block, round)
			install := func() error {
				for off := int64(0); off < f.Size(); off += 3 * block {
					if err := f.Erase(off, 3*block); err != nil {
						return err
					}
				}
				for off := int64(0); off < f.Size(); {
					n := min(int64(1+r.IntN(12))*page, f.Size()-off)
					if _, err := f.WriteAt(data[off:off+n], off); err != nil {
						return err
					}
					off += n
				}
				return nil
			}
			err := fmt.Errorf("not tried")
			for try := 0; err != nil; try++ {
				require.Less(t, try, 13, "seed %d: %v", seed, err)
				if err = install(); err != nil {
					failures++
					require.True(t, errors.Is(err, ErrBadBlock) || errors.Is(err, ErrMoved), "%v", err)
				}
			}
			for _, g := range []*Flash{f, open(t, c, &Options{Size: size * block})} {
				got := make([]byte, len(data))
				_, err := g.ReadAt(got, 0)
				require.NoError(t, err)
				require.True(t, bytes.Equal(data, got), "seed %d", seed)
			}
		}
		require.NoError(t, f.Close())
	}
	require.Positive(t, failures)
	t.Logf("200 chips, 800 updates, %d repeated", failures)
}
