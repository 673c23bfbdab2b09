package flashtest

import (
	"bytes"
	"errors"
	"io"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// good is a flash to be sabotaged: an eraser with units of 1 KiB and program
// units of 16 bytes, which keeps its own rules.
type good struct {
	ota.Flash
	e ota.Eraser
	u ota.UnitEraser
}

func newGood() *good {
	f := memflash.New(memflash.Config{Size: 12 << 10, EraseSize: 1 << 10, WriteSize: 16})
	return &good{f, f.(ota.Eraser), f.(ota.UnitEraser)}
}

func (g *good) EraseSize() int64                     { return g.e.EraseSize() }
func (g *good) Erase(off, n int64) error             { return g.e.Erase(off, n) }
func (g *good) EraseUnit(off int64) (start, n int64) { return g.u.EraseUnit(off) }
func (g *good) WriteSize() int64                     { return 16 }

func rules(err error) (names []string) {
	if err == nil {
		return nil
	}
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		names = append(names, e.(*Violation).Rule)
	}
	return names
}

func TestGood(t *testing.T) {
	require.NoError(t, Test(newGood()))
	for _, g := range crashtest.Geometries() {
		for _, n := range []int64{3 << 10, 13 << 10, 600 << 10} {
			cfg := g.Config(n)
			if cfg.EraseSize > 0 {
				cfg.Size = max(cfg.Size, 3*cfg.EraseSize)
			}
			chip := memflash.NewChip(cfg)
			require.NoError(t, Test(chip.Flashes()[0]), "%s, %d bytes", g.Name, n)
		}
	}
	for n := int64(8); n < 40; n++ {
		require.NoError(t, Test(memflash.New(memflash.Config{Size: n})), "%d bytes", n)
	}
	require.NoError(t, Test(memflash.New(memflash.Config{Size: 12, WriteSize: 4})))
	require.NoError(t, Test(memflash.New(memflash.Config{Size: 4 << 30, EraseSize: 128 << 10})))
	require.NoError(t, Test(memflash.New(memflash.Config{Size: 48, EraseSize: 16, WriteSize: 16})))
}

func TestTooSmall(t *testing.T) {
	for _, cfg := range []memflash.Config{{}, {Size: 7}, {Size: 1024, WriteSize: 512}, {Size: 8 << 10, EraseSize: 4 << 10}} {
		err := Test(memflash.New(cfg))
		require.ErrorIs(t, err, ota.ErrInvalid, "%+v", cfg)
		require.Len(t, rules(err), 1)
	}
}

// Doubles, each with one thing wrong.

type shortRead struct{ *good }

func (f shortRead) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.good.ReadAt(p, off)
	if len(p) > 1 && n == len(p) {
		return n - 1, nil
	}
	return n, err
}

type zeroesBeyondEnd struct{ *good }

func (f zeroesBeyondEnd) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.good.ReadAt(p, off)
	if err == io.EOF {
		clear(p[n:])
		return len(p), nil
	}
	return n, err
}

type eofIsUnexpected struct{ *good }

func (f eofIsUnexpected) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.good.ReadAt(p, off)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

type alignedReads struct{ *good }

func (f alignedReads) ReadAt(p []byte, off int64) (int, error) {
	return f.good.ReadAt(p, off&^15)
}

type shortWrite struct{ *good }

func (f shortWrite) WriteAt(p []byte, off int64) (int, error) {
	if len(p) > 32 {
		return f.good.WriteAt(p[:32], off)
	}
	return f.good.WriteAt(p, off)
}

type swallowsWriteErrors struct{ *good }

func (f swallowsWriteErrors) WriteAt(p []byte, off int64) (int, error) {
	f.good.WriteAt(p, off)
	return len(p), nil
}

type scribbles struct{ *good }

func (f scribbles) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.good.WriteAt(p, off)
	p[0]++
	return n, err
}

type wrapsAround struct{ *good }

func (f wrapsAround) WriteAt(p []byte, off int64) (int, error) {
	if off >= f.Size() {
		f.e.Erase(0, 1024)
		return f.good.WriteAt(p, off%f.Size())
	}
	return f.good.WriteAt(p, off)
}

type clipsWrites struct{ *good }

func (f clipsWrites) WriteAt(p []byte, off int64) (int, error) {
	if rest := f.Size() - off; rest > 0 && rest < int64(len(p)) {
		n, err := f.good.WriteAt(p[:rest], off)
		if err == nil {
			err = io.ErrShortWrite
		}
		return n, err
	}
	return f.good.WriteAt(p, off)
}

type padsWrites struct{ *good }

func (f padsWrites) WriteAt(p []byte, off int64) (int, error) {
	if n := len(p) % 16; n != 0 && off%16 == 0 {
		if _, err := f.good.WriteAt(append(bytes.Clone(p), make([]byte, 16-n)...), off); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	return f.good.WriteAt(p, off)
}

type spills struct{ *good }

func (f spills) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.good.WriteAt(p, off)
	if err == nil && len(p) == 16 && off%1024 == 512 {
		f.good.WriteAt(make([]byte, 16), off+16)
	}
	return n, err
}

type neverErases struct{ *good }

func (f neverErases) Erase(off, n int64) error { return nil }

type erasesFirstOnly struct{ *good }

func (f erasesFirstOnly) Erase(off, n int64) error {
	return f.e.Erase(off, min(n, 1024))
}

type erasesTooMuch struct{ *good }

func (f erasesTooMuch) Erase(off, n int64) error {
	if off+n < f.Size() && n == 1024 {
		n += 1024
	}
	return f.e.Erase(off, n)
}

type roundsErases struct{ *good }

func (f roundsErases) Erase(off, n int64) error {
	end := (off + n + 1023) / 1024 * 1024
	off = off / 1024 * 1024
	return f.e.Erase(off, end-off)
}

type clipsErases struct{ *good }

func (f clipsErases) Erase(off, n int64) error {
	if off >= 0 && n > f.Size()-off {
		n = max(0, f.Size()-off)
		off = min(off, f.Size())
	}
	return f.e.Erase(off, n)
}

type claimsZero struct{ *good }

func (f claimsZero) ErasedByte() byte { return 0 }

type claimsSmallUnits struct{ *good }

func (f claimsSmallUnits) EraseSize() int64 { return 512 }

type claimsLargeUnits struct{ *good }

func (f claimsLargeUnits) EraseSize() int64 { return 4096 }

type holes struct{ *good }

func (f holes) EraseUnit(off int64) (start, n int64) {
	start, n = f.u.EraseUnit(off)
	if start == 4096 {
		n -= 512
	}
	return start, n
}

type beyond struct{ *good }

func (f beyond) EraseUnit(off int64) (start, n int64) {
	start, n = f.u.EraseUnit(off)
	if start+n == f.Size() {
		n *= 2
	}
	return start, n
}

type insideDiffers struct{ *good }

func (f insideDiffers) EraseUnit(off int64) (start, n int64) {
	if off%1024 != 0 {
		return off, 1024 - off%1024
	}
	return f.u.EraseUnit(off)
}

type emptyUnits struct{ *good }

func (f emptyUnits) EraseUnit(off int64) (start, n int64) { return off, 0 }

type oddWriteSize struct{ *good }

func (f oddWriteSize) WriteSize() int64 { return 48 }

type noWriteSize struct{ *good }

func (f noWriteSize) WriteSize() int64 { return 0 }

type failsSync struct{ *good }

func (f failsSync) Sync() error { return errors.New("no") }

// dropsOnSync loses what was last written when it syncs.
type dropsOnSync struct{ *good }

func (f dropsOnSync) Sync() error { return f.e.Erase(f.Size()-1024, 1024) }

type shrinks struct {
	*good
	n *atomic.Int64
}

func (f shrinks) Size() int64 {
	if f.n.Add(1) > 1 {
		return 11 << 10
	}
	return 12 << 10
}

type empty struct{ *good }

func (f empty) Size() int64 { return 0 }

type panics struct{ *good }

func (f panics) ReadAt(p []byte, off int64) (int, error) {
	return f.good.ReadAt(p[:len(p)-int(off&1)*9000], off)
}

// seeks reads with a position that all readers share.
type seeks struct {
	*good
	mu  *sync.Mutex
	pos *int64
}

func (f seeks) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	*f.pos = off
	f.mu.Unlock()
	for range 5 {
		runtime.Gosched()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.good.ReadAt(p, *f.pos)
}

// keeps writes what it was given only when it is asked for something else.
type keeps struct {
	*good
	p   []byte
	off int64
}

func (f *keeps) WriteAt(p []byte, off int64) (int, error) {
	f.flush()
	f.p, f.off = p, off
	return len(p), nil
}

func (f *keeps) flush() {
	if f.p != nil {
		f.good.WriteAt(f.p, f.off)
		f.p = nil
	}
}

func (f *keeps) ReadAt(p []byte, off int64) (int, error) {
	f.flush()
	return f.good.ReadAt(p, off)
}

// grows is a file that becomes longer when it is written beyond its end.
type grows struct{ b []byte }

func (f *grows) Size() int64 { return int64(len(f.b)) }
func (f *grows) Sync() error { return nil }
func (f *grows) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(f.b).ReadAt(p, off)
}
func (f *grows) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > 1<<20 {
		return 0, ota.ErrInvalid
	}
	if n := int(off) + len(p) - len(f.b); n > 0 {
		f.b = append(f.b, make([]byte, n)...)
	}
	return copy(f.b[off:], p), nil
}

// writeOnce is flash that must be erased, and does not say so.
type writeOnce struct{ ota.Flash }

type unitsOnly struct{ ota.Flash }

func (f unitsOnly) EraseUnit(off int64) (start, n int64) { return 0, f.Size() }

func TestSabotage(t *testing.T) {
	for name, tc := range map[string]struct {
		f    ota.Flash
		rule string
	}{
		"reads one byte less":             {shortRead{newGood()}, "read-count"},
		"reads zeros beyond the end":      {zeroesBeyondEnd{newGood()}, "read-end"},
		"no io.EOF at the end":            {eofIsUnexpected{newGood()}, "read-end"},
		"reads aligned places only":       {alignedReads{newGood()}, "read"},
		"writes less":                     {shortWrite{newGood()}, "write-count"},
		"swallows errors of writes":       {swallowsWriteErrors{newGood()}, "write-bounds"},
		"swallows them on alignment":      {swallowsWriteErrors{newGood()}, "write-align"},
		"changes the buffer":              {scribbles{newGood()}, "write-buffer"},
		"keeps the buffer":                {&keeps{good: newGood()}, "write-buffer"},
		"writes around the end":           {wrapsAround{newGood()}, "write-bounds"},
		"writes what fits":                {clipsWrites{newGood()}, "write-bounds"},
		"grows":                           {&grows{make([]byte, 9000)}, "write-bounds"},
		"pads writes":                     {padsWrites{newGood()}, "write-align"},
		"writes more":                     {spills{newGood()}, "write-neighbours"},
		"never erases":                    {neverErases{newGood()}, "erased"},
		"erases the first unit":           {erasesFirstOnly{newGood()}, "erased"},
		"erases the next unit":            {erasesTooMuch{newGood()}, "erase-neighbours"},
		"rounds what it erases":           {roundsErases{newGood()}, "erase-align"},
		"erases what fits":                {clipsErases{newGood()}, "erase-bounds"},
		"names another erased byte":       {claimsZero{newGood()}, "erased"},
		"names too small units":           {claimsSmallUnits{newGood()}, "geometry"},
		"names too large units":           {claimsLargeUnits{newGood()}, "geometry"},
		"has holes between units":         {holes{newGood()}, "geometry"},
		"has a unit beyond the end":       {beyond{newGood()}, "geometry"},
		"has other units inside of units": {insideDiffers{newGood()}, "geometry"},
		"has empty units":                 {emptyUnits{newGood()}, "geometry"},
		"has units without erasing":       {unitsOnly{&grows{make([]byte, 9000)}}, "geometry"},
		"write units divide nothing":      {oddWriteSize{newGood()}, "geometry"},
		"write units of nothing":          {noWriteSize{newGood()}, "geometry"},
		"cannot sync":                     {failsSync{newGood()}, "sync"},
		"loses data when it syncs":        {dropsOnSync{newGood()}, "sync"},
		"becomes smaller":                 {shrinks{newGood(), new(atomic.Int64)}, "size"},
		"is empty":                        {empty{newGood()}, "size"},
		"reads by seeking":                {seeks{newGood(), new(sync.Mutex), new(int64)}, "concurrent"},
		"panics":                          {panics{newGood()}, "panic"},
		"must be erased":                  {writeOnce{newGood()}, "write"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Test(tc.f)
			require.Error(t, err)
			names := rules(err)
			require.Contains(t, names, tc.rule, "%v", err)
			slices.Sort(names)
			require.Len(t, slices.Compact(names), len(rules(err)), "each rule is reported once")
			require.NotContains(t, err.Error(), "%!")
		})
	}
}

func TestViolation(t *testing.T) {
	err := Test(failsSync{newGood()})
	var v *Violation
	require.ErrorAs(t, err, &v)
	require.Equal(t, "sync", v.Rule)
	require.EqualError(t, v, "flashtest: rule sync: no")
	require.EqualError(t, errors.Unwrap(v), "no")
}

// The package is for devices, too.
func TestNoTesting(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("needs the go command in PATH")
	}
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	require.NoError(t, err)
	require.NotContains(t, strings.Fields(string(out)), "testing")
}

// optional is a flash that needs no erasing, with all that is optional.
type optional struct {
	ota.Flash
	size func() int64
	at   func(f ota.Flash, p []byte, off int64) (int, error) // reads past the cache
	zero func(f ota.Flash, off, n int64) error
}

func (o *optional) IOSize() int64             { return o.size() }
func (o *optional) DirectReader() io.ReaderAt { return past{o} }
func (o *optional) Zero(off, n int64) error   { return o.zero(o.Flash, off, n) }

type past struct{ o *optional }

func (p past) ReadAt(b []byte, off int64) (int, error) { return p.o.at(p.o.Flash, b, off) }

func TestOptional(t *testing.T) {
	outside := errors.New("outside")
	zero := func(f ota.Flash, off, n int64) error {
		if off < 0 || n < 0 || off > f.Size()-n {
			return outside
		}
		_, err := f.WriteAt(make([]byte, n), off)
		return err
	}
	read := func(f ota.Flash, p []byte, off int64) (int, error) { return f.ReadAt(p, off) }
	var stale []byte
	calls := int64(0)
	for name, c := range map[string]struct {
		spoil func(o *optional)
		want  string // the first rule that is broken
	}{
		"good": {func(*optional) {}, ""},
		"cannot zero": {func(o *optional) {
			o.zero = func(f ota.Flash, off, n int64) error {
				if off < 0 || n < 0 || off > f.Size()-n {
					return outside
				}
				return ota.ErrUnsupported
			}
		}, ""},
		"negative size": {func(o *optional) { o.size = func() int64 { return -1 } }, "io-size"},
		"changing size": {func(o *optional) { o.size = func() int64 { calls++; return calls } }, "io-size"},
		"stale": {func(o *optional) {
			stale = nil
			o.at = func(f ota.Flash, p []byte, off int64) (int, error) {
				if stale == nil {
					stale = make([]byte, f.Size())
					_, _ = f.ReadAt(stale, 0)
				}
				return bytes.NewReader(stale).ReadAt(p, off)
			}
		}, "direct"},
		"aligned only": {func(o *optional) {
			o.at = func(f ota.Flash, p []byte, off int64) (int, error) { return f.ReadAt(p, off&^511) }
		}, "direct"},
		"beyond the end": {func(o *optional) {
			o.at = func(f ota.Flash, p []byte, off int64) (int, error) {
				n, _ := f.ReadAt(p, off)
				return n, nil
			}
		}, "direct"},
		"zeroes too little": {func(o *optional) {
			o.zero = func(f ota.Flash, off, n int64) error { return zero(f, off, max(n-1, min(n, 0))) }
		}, "zero"},
		"zeroes too much": {func(o *optional) {
			o.zero = func(f ota.Flash, off, n int64) error {
				if end := off + n; n > 0 && end < f.Size() {
					n++
				}
				return zero(f, off, n)
			}
		}, "zero"},
		"says it cannot": {func(o *optional) {
			o.zero = func(f ota.Flash, off, n int64) error {
				if err := zero(f, off, n); err != nil {
					return err
				}
				return ota.ErrUnsupported
			}
		}, "zero"},
		"fails": {func(o *optional) { o.zero = func(ota.Flash, int64, int64) error { return outside } }, "zero"},
		"zeroes what is inside": {func(o *optional) {
			o.zero = func(f ota.Flash, off, n int64) error {
				off, end := max(off, 0), min(off+max(n, 0), f.Size())
				return zero(f, min(off, end), end-min(off, end))
			}
		}, "zero-bounds"},
	} {
		t.Run(name, func(t *testing.T) {
			o := &optional{memflash.New(memflash.Config{Size: 64 << 10}), func() int64 { return 4096 }, read, zero}
			c.spoil(o)
			broken := append(rules(Test(o)), "")
			require.Equal(t, c.want, broken[0])
		})
	}
}
