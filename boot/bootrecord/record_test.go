package bootrecord

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// geometry is a kind of flash; it has room for 5 copies.
type geometry struct {
	name string
	cfg  memflash.Config
}

var geometries = []geometry{
	{"nor4k", memflash.Config{Size: 5 << 12, EraseSize: 1 << 12}},
	{"nor512-unsynced", memflash.Config{Size: 5 << 12, EraseSize: 512, WriteSize: 8, Unsynced: true}},
	{"mixed", memflash.Config{EraseUnits: []int64{1024, 1024, 2048, 4096, 8192, 16384, 65536}, WriteSize: 256}},
	{"erased00", memflash.Config{Size: 5 << 12, EraseSize: 1 << 12, WriteSize: 4, ErasedZero: true}},
	{"page3072", memflash.Config{Size: 5 * 6144, EraseSize: 6144, WriteSize: 3072}},
	{"file", memflash.Config{Size: 5 << 12}},
	{"disk-unsynced", memflash.Config{Size: 5 << 12, WriteSize: 512, Unsynced: true}},
}

// device is a chip with a record of k copies.
type device struct {
	chip *memflash.Chip
	k    int
	off  []int64 // where the places begin

}

func newDevice(t *testing.T, g geometry, k int) *device {
	t.Helper()
	d := &device{chip: memflash.NewChip(g.cfg), k: k}
	require.NoError(t, d.chip.Err())
	off := int64(0)
	for _, p := range d.places(t) {
		d.off = append(d.off, off)
		off += p.Size()
	}
	return d
}

func (d *device) places(t *testing.T) []ota.Flash {
	t.Helper()
	places, err := Split(d.chip.Flashes()[0], d.k)
	require.NoError(t, err)
	return places
}

// record opens the record, as after a boot.
func (d *device) record(t *testing.T) *Record {
	t.Helper()
	r, err := New(d.places(t), nil)
	require.NoError(t, err)
	return r
}

func (d *device) clone() *device {
	c := *d
	c.chip = d.chip.Clone()
	return &c
}

func (d *device) peek(t *testing.T, i int) []byte {
	t.Helper()
	b := make([]byte, MaxSize)
	require.NoError(t, d.chip.Peek(0, b, d.off[i]))
	return b
}

func (d *device) poke(t *testing.T, i int, b []byte) {
	t.Helper()
	require.NoError(t, d.chip.Poke(0, b, d.off[i]))
}

// at limits f to copy i, for ever.
func (d *device) at(i int, f memflash.Fault) memflash.Fault {
	f.Off, f.Len, f.Forever = d.off[i], MaxSize, true
	return f
}

// requireAgree checks that all copies hold the same record, and s.
func (d *device) requireAgree(t *testing.T, s ota.BootState) {
	t.Helper()
	var first []byte
	for i := range d.k {
		rec, raw, err := decode(d.peek(t, i))
		require.NoError(t, err, "copy %d", i)
		require.True(t, rec.state.Equal(s), "copy %d", i)
		require.Zero(t, rec.missing)
		if i == 0 {
			first = raw
		}
		require.Equal(t, first, raw, "copy %d", i)
	}
}

// encoded returns a record of s.
func encoded(t *testing.T, gen uint64, s ota.BootState) []byte {
	t.Helper()
	rec := record{gen: gen, state: s}
	raw, err := rec.encode()
	require.NoError(t, err)
	return raw
}

// state returns one of many states of different lengths.
func state(n int) ota.BootState {
	return ota.BootState{
		Active: ota.SlotID(n % 2), Revert: ota.SlotID(1 - n%2), Committed: n%3 == 0, Tries: n % 2, Floor: uint64(n),
		Trial: ota.TrialID{byte(n), byte(n >> 8)},
		Slots: []ota.SlotState{{Version: strings.Repeat("v", n%ota.MaxVersion)}, {Parts: make([]ota.PartState, n%3)}},
		Last:  ota.Result{Slot: ota.NoSlot},
	}
}

func requireState(t *testing.T, want, got ota.BootState) {
	t.Helper()
	require.True(t, got.Equal(want), "want %+v, got %+v", want, got)
}

func load(t *testing.T, d *device) ota.BootState {
	t.Helper()
	s, err := d.record(t).Load(t.Context())
	require.NoError(t, err)
	return s
}

func TestStoreLoad(t *testing.T) {
	for _, g := range geometries {
		for k := 2; k <= 4; k++ {
			t.Run(fmt.Sprintf("%s/%d", g.name, k), func(t *testing.T) {
				ctx := t.Context()
				d := newDevice(t, g, k)
				r := d.record(t)
				_, err := r.Load(ctx)
				require.ErrorIs(t, err, ota.ErrNoBootState)
				_, err = r.Heal(ctx)
				require.ErrorIs(t, err, ota.ErrNoBootState)
				require.Zero(t, d.chip.Ops())

				for _, s := range states() {
					require.NoError(t, r.Store(ctx, s))
					d.requireAgree(t, s)
					ops := d.chip.Ops()
					require.NoError(t, r.Store(ctx, s))
					requireState(t, s, load(t, d))
					healed, err := d.record(t).Heal(ctx)
					require.NoError(t, err)
					requireState(t, s, healed)
					require.Equal(t, ops, d.chip.Ops(), "something was written")
					require.Equal(t, Health{Copies: k, Good: k, Errs: make([]error, k)}, r.Health())
				}
				require.NoError(t, d.chip.Err())
			})
		}
	}
}

func TestNewRefuses(t *testing.T) {
	flash := func(n int64) ota.Flash { return memflash.New(memflash.Config{Size: n}) }
	one := flash(MaxSize)
	nine := make([]ota.Flash, MaxCopies+1)
	for i := range nine {
		nine[i] = flash(MaxSize)
	}
	for name, places := range map[string][]ota.Flash{
		"none":       nil,
		"one":        {one},
		"nine":       nine,
		"nil":        {one, nil},
		"the same":   {one, flash(MaxSize), one},
		"small":      {one, flash(MaxSize - 1)},
		"write size": {one, memflash.New(memflash.Config{Size: 2 << 20, WriteSize: 2 << 20})},
		"units":      {one, memflash.New(memflash.Config{Size: 3 << 10, EraseSize: 1 << 10})},
		"no units":   {one, oddFlash{one, 0, 0}},
		"start":      {one, oddFlash{one, 1, MaxSize}},
		"too long":   {one, oddFlash{one, 0, 1 << 62}},
	} {
		r, err := New(places, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, name)
		require.Nil(t, r)
	}
	r, err := New([]ota.Flash{flash(MaxSize), flash(MaxSize)}, nil)
	require.NoError(t, err)
	require.Equal(t, Health{Copies: 2}, r.Health())
	_, err = New([]ota.Flash{one, struct{ ota.Flash }{one}, sliceFlash{{one}}}, nil)
	require.NoError(t, err)
}

// oddFlash has erase units that make no sense.
type oddFlash struct {
	ota.Flash
	start, n int64
}

func (f oddFlash) EraseSize() int64               { return f.n }
func (f oddFlash) Erase(off, n int64) error       { return errors.ErrUnsupported }
func (f oddFlash) EraseUnit(int64) (int64, int64) { return f.start, f.n }

// sliceFlash cannot be compared.
type sliceFlash []struct{ ota.Flash }

func (f sliceFlash) ReadAt(p []byte, off int64) (int, error)  { return f[0].ReadAt(p, off) }
func (f sliceFlash) WriteAt(p []byte, off int64) (int, error) { return f[0].WriteAt(p, off) }
func (f sliceFlash) Size() int64                              { return f[0].Size() }
func (f sliceFlash) Sync() error                              { return f[0].Sync() }

func TestSplit(t *testing.T) {
	for _, c := range []struct {
		cfg    memflash.Config
		copies int
		want   []int64 // sizes, nil: refused
	}{
		{memflash.Config{Size: 3 << 12}, 3, []int64{4096, 4096, 4096}},
		{memflash.Config{Size: 3<<12 - 1}, 3, nil},
		{memflash.Config{Size: 1 << 20}, 2, []int64{4096, 4096}},
		{memflash.Config{Size: 3 * 6144, WriteSize: 3072}, 3, []int64{6144, 6144, 6144}},
		{memflash.Config{Size: 3 << 16, EraseSize: 1 << 16}, 3, []int64{65536, 65536, 65536}},
		{memflash.Config{Size: 2 << 16, EraseSize: 1 << 16}, 3, nil},
		{memflash.Config{Size: 3 << 12, EraseSize: 1 << 11}, 3, []int64{4096, 4096, 4096}},
		{memflash.Config{EraseUnits: []int64{1024, 2048, 2048, 512, 3584, 8192}}, 3, []int64{5120, 4096, 8192}},
		{memflash.Config{EraseUnits: []int64{1024, 2048, 2048, 512, 3584}}, 3, nil},
		{memflash.Config{Size: 1 << 20}, 1, nil},
		{memflash.Config{Size: 1 << 20}, MaxCopies + 1, nil},
		{memflash.Config{Size: 4 << 20, WriteSize: 2 << 20}, 2, nil},
	} {
		places, err := Split(memflash.New(c.cfg), c.copies)
		if c.want == nil {
			require.ErrorIs(t, err, ota.ErrInvalid, "%+v", c)
			continue
		}
		require.NoError(t, err, "%+v", c)
		var sizes []int64
		for _, p := range places {
			sizes = append(sizes, p.Size())
		}
		require.Equal(t, c.want, sizes, "%+v", c)
	}
	_, err := Split(nil, 2)
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = Split(oddFlash{memflash.New(memflash.Config{Size: 3 << 12}), 1, 4096}, 2)
	require.ErrorIs(t, err, ota.ErrInvalid)
}

func TestRunning(t *testing.T) {
	d := newDevice(t, geometries[0], 2)
	_, err := d.record(t).Running(t.Context())
	require.ErrorIs(t, err, ota.ErrUnsupported)
	r, err := New(d.places(t), &Options{Running: func(context.Context) (ota.SlotID, error) { return 1, io.ErrNoProgress }})
	require.NoError(t, err)
	id, err := r.Running(t.Context())
	require.Equal(t, ota.SlotID(1), id)
	require.ErrorIs(t, err, io.ErrNoProgress)
}

func TestStoreInvalid(t *testing.T) {
	d := newDevice(t, geometries[0], 3)
	r := d.record(t)
	require.ErrorIs(t, r.Store(t.Context(), ota.BootState{Active: ota.MaxSlots}), ota.ErrInvalid)
	require.Zero(t, d.chip.Stats().Reads)
	require.NoError(t, r.Store(t.Context(), state(1)))

	// No generation is left.
	for i := range 3 {
		d.poke(t, i, encoded(t, maxGeneration, state(2)))
	}
	ops := d.chip.Ops()
	require.ErrorIs(t, r.Store(t.Context(), state(3)), ota.ErrInvalid)
	d.poke(t, 0, []byte{0})
	s, err := r.Heal(t.Context())
	require.NoError(t, err)
	requireState(t, state(2), s)
	require.Equal(t, ops, d.chip.Ops())
}

// damages are the ways in which a copy can be bad. Those with a fault stay so
// until the fault goes away.
var damages = []struct {
	name   string
	poke   func(good, old []byte) []byte // new content; good and old are whole places
	faults []memflash.Fault
}{
	{name: "flip", poke: func(g, _ []byte) []byte { g[30] ^= 4; return g }},
	{name: "flip in checksum", poke: func(g, _ []byte) []byte { g[binary.LittleEndian.Uint32(g[12:])-1] ^= 0x80; return g }},
	{name: "torn", poke: func(g, o []byte) []byte { copy(g[50:], o[50:]); return g }},
	{name: "half erased", poke: func(g, _ []byte) []byte { return append(g[:40], bytes.Repeat([]byte{0xff}, MaxSize-40)...) }},
	{name: "erased", poke: func(g, _ []byte) []byte { return bytes.Repeat([]byte{0xff}, MaxSize) }},
	{name: "zeros", poke: func(g, _ []byte) []byte { return make([]byte, MaxSize) }},
	{name: "garbage", poke: func(g, _ []byte) []byte { return bytes.Repeat([]byte("garbage!"), MaxSize/8) }},
	{name: "stale", poke: func(_, o []byte) []byte { return o }},
	{name: "unreadable", faults: []memflash.Fault{{Kind: memflash.Fail, On: memflash.OpRead}}},
	{name: "dead", faults: []memflash.Fault{
		{Kind: memflash.Fail, On: memflash.OpRead}, {Kind: memflash.Fail, On: memflash.OpWrite | memflash.OpErase}}},
	{name: "garbage for ever", poke: func(g, _ []byte) []byte { g[30] ^= 4; return g },
		faults: []memflash.Fault{{Kind: memflash.Fail, On: memflash.OpWrite | memflash.OpErase}}},
	{name: "write fails half-way", poke: func(g, _ []byte) []byte { g[30] ^= 4; return g },
		faults: []memflash.Fault{{Kind: memflash.Fail, On: memflash.OpWrite, N: 64}}},
	{name: "silent", poke: func(g, _ []byte) []byte { g[30] ^= 4; return g },
		faults: []memflash.Fault{{Kind: memflash.Skip, On: memflash.OpWrite | memflash.OpErase}}},
	{name: "stale for ever", poke: func(_, o []byte) []byte { return o },
		faults: []memflash.Fault{{Kind: memflash.Skip, On: memflash.OpWrite | memflash.OpErase}}},
}

// subsets calls fn for all sets of n of k copies.
func subsets(k, n int, fn func(set []int)) {
	for m := range 1 << k {
		var set []int
		for i := range k {
			if m&(1<<i) != 0 {
				set = append(set, i)
			}
		}
		if len(set) == n {
			fn(set)
		}
	}
}

// TestDamage lets up to K-2 copies go bad in every way, and 1 of 2.
func TestDamage(t *testing.T) {
	type bad struct{ copies, kinds []int }
	for n, g := range geometries {
		for k := 2; k <= 4; k++ {
			if !*full && k == 4 && n > 0 {
				continue
			}
			var cases []bad
			for n := 1; n <= max(1, k-2); n++ {
				subsets(k, n, func(set []int) {
					kinds := make([]int, n)
					for {
						cases = append(cases, bad{set, append([]int(nil), kinds...)})
						j := 0
						for ; j < n; j++ {
							if kinds[j]++; kinds[j] < len(damages) {
								break
							}
							kinds[j] = 0
						}
						if j == n {
							return
						}
					}
				})
			}
			base := newDevice(t, g, k)
			r := base.record(t)
			require.NoError(t, r.Store(t.Context(), state(1)))
			old := base.peek(t, 0)
			require.NoError(t, r.Store(t.Context(), state(2)))
			good := base.peek(t, 0)
			for _, c := range cases {
				name := fmt.Sprintf("%s, %d copies", g.name, k)
				for j, i := range c.copies {
					name += fmt.Sprintf(", %d %s", i, damages[c.kinds[j]].name)
				}
				d := base.clone()
				var faults []memflash.Fault
				for j, i := range c.copies {
					kind := &damages[c.kinds[j]]
					if kind.poke != nil {
						d.poke(t, i, kind.poke(bytes.Clone(good), old))
					}
					for _, f := range kind.faults {
						faults = append(faults, d.at(i, f))
					}
				}
				d.chip.Plan(faults...)
				requireState(t, state(2), load(t, d))
				s, err := d.record(t).Heal(t.Context())
				require.NoError(t, err, name)
				requireState(t, state(2), s)
				if len(faults) == 0 {
					d.requireAgree(t, state(2))
				}
				ops := d.chip.Stats()
				requireState(t, state(2), load(t, d))
				require.Equal(t, ops.Ops, d.chip.Ops(), name)

				err = d.record(t).Store(t.Context(), state(3))
				if k == 2 && len(faults) > 0 {
					require.Error(t, err, name)
					requireState(t, state(2), load(t, d))
				} else {
					require.NoError(t, err, name)
					requireState(t, state(3), load(t, d))
				}
				want := load(t, d)
				s, err = d.record(t).Heal(t.Context())
				require.NoError(t, err, name)
				requireState(t, want, s)
				d.chip.Plan()
				requireState(t, want, load(t, d)) // also when the bad copies are back
				s, err = d.record(t).Heal(t.Context())
				require.NoError(t, err, name)
				requireState(t, want, s)
				d.requireAgree(t, want)
			}
		}
	}
}

// TestEveryBitFlipInEveryCopy: see also TestEveryBitFlip.
func TestEveryBitFlipInEveryCopy(t *testing.T) {
	for name, s := range states() {
		for k := 2; k <= 4; k++ {
			base := newDevice(t, geometries[0], k)
			r := base.record(t)
			require.NoError(t, r.Store(t.Context(), state(1)))
			require.NoError(t, r.Store(t.Context(), s))
			n := int(binary.LittleEndian.Uint32(base.peek(t, 0)[12:]))
			for i := range k {
				step := 1
				if !*full && k != 3 {
					step = 7
				}
				if name == "full" {
					step = 61 // of 8 times 3860 bits
				}
				for bit := 0; bit < 8*n; bit += step {
					off := base.off[i] + int64(bit/8)
					require.NoError(t, base.chip.FlipBit(0, off, uint(bit%8)))
					got, err := base.record(t).Load(t.Context())
					require.NoError(t, err)
					requireState(t, s, got)
					if bit%16 == 3 {
						d := base.clone()
						got, err := d.record(t).Heal(t.Context())
						require.NoError(t, err)
						requireState(t, s, got)
						d.requireAgree(t, s)
					}
					require.NoError(t, base.chip.FlipBit(0, off, uint(bit%8)))
				}
			}
		}
	}
}

func TestAllBad(t *testing.T) {
	ctx := t.Context()
	for k := 2; k <= 4; k++ {
		base := newDevice(t, geometries[0], k)
		require.NoError(t, base.record(t).Store(ctx, state(1)))

		d := base.clone()
		for i := range k {
			require.NoError(t, d.chip.FlipBit(0, d.off[i]+20, 1))
		}
		_, err := d.record(t).Load(ctx)
		require.ErrorIs(t, err, ota.ErrBadBootState)
		_, err = d.record(t).Heal(ctx)
		require.ErrorIs(t, err, ota.ErrBadBootState)
		require.Zero(t, d.chip.Ops())

		// A damaged copy beside blank ones is the first store, cut off.
		first := d.clone()
		for i := range k - 1 {
			first.poke(t, i, bytes.Repeat([]byte{0xff}, MaxSize))
		}
		_, err = first.record(t).Load(ctx)
		require.ErrorIs(t, err, ota.ErrNoBootState)
		require.NotErrorIs(t, err, ota.ErrBadBootState)
		require.NoError(t, first.record(t).Store(ctx, state(2)))
		first.poke(t, 1, encoded(t, 1000, state(9)))
		requireState(t, state(2), load(t, first))

		// Two are not.
		if k > 2 {
			d.poke(t, 0, bytes.Repeat([]byte{0xff}, MaxSize))
		}
		_, err = d.record(t).Load(ctx)
		require.ErrorIs(t, err, ota.ErrBadBootState)
		require.NotErrorIs(t, err, ota.ErrNoBootState)

		// A read error is neither.
		d.chip.Plan(d.at(0, memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead}))
		_, err = d.record(t).Load(ctx)
		require.ErrorIs(t, err, memflash.ErrFault)
		require.NotErrorIs(t, err, ota.ErrBadBootState)
		require.NotErrorIs(t, err, ota.ErrNoBootState)
		d.chip.Plan()

		// A new start works, and what was lost does not come back.
		back := encoded(t, 1000, state(9))
		require.NoError(t, d.record(t).Store(ctx, state(2)))
		d.requireAgree(t, state(2))
		d.poke(t, 1, back)
		requireState(t, state(2), load(t, d))

		// Blank copies beside one that cannot be read are no blank record.
		d = newDevice(t, geometries[0], k)
		d.chip.Plan(d.at(k-1, memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead}))
		_, err = d.record(t).Load(ctx)
		require.ErrorIs(t, err, memflash.ErrFault)
		require.NotErrorIs(t, err, ota.ErrNoBootState)
	}
}

func TestReadErrors(t *testing.T) {
	ctx := t.Context()
	d := newDevice(t, geometries[0], 3)
	require.NoError(t, d.record(t).Store(ctx, state(1)))
	n := d.chip.Stats().Reads
	fail := func(n int) (faults []memflash.Fault) {
		for i := range n {
			faults = append(faults, memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, At: d.chip.Stats().Reads + i})
		}
		return faults
	}
	// Two failures are got over, three are damage.
	r := d.record(t)
	ops := d.chip.Ops()
	d.chip.Plan(fail(2)...)
	s, err := r.Heal(ctx)
	require.NoError(t, err)
	requireState(t, state(1), s)
	require.Equal(t, n+5, d.chip.Stats().Reads)
	require.Equal(t, ops, d.chip.Ops())
	require.Equal(t, 3, r.Health().Good)

	d.chip.Plan(fail(3)...)
	s, err = r.Load(ctx)
	require.NoError(t, err)
	requireState(t, state(1), s)
	require.Equal(t, 2, r.Health().Good)
	require.ErrorIs(t, r.Health().Errs[0], memflash.ErrFault)
	require.NoError(t, r.Health().Errs[1])

	// A short read is an error.
	short, err := Split(memflash.New(memflash.Config{Size: 3 << 12}), 3)
	require.NoError(t, err)
	short[1] = shortFlash{short[1]}
	r, err = New(short, nil)
	require.NoError(t, err)
	_, err = r.Load(ctx)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.ErrorIs(t, r.Health().Errs[1], io.ErrUnexpectedEOF)
	require.NoError(t, r.Store(ctx, state(2)))
	require.ErrorIs(t, r.Health().Errs[1], io.ErrShortWrite)
}

type shortFlash struct{ ota.Flash }

func (f shortFlash) ReadAt(p []byte, off int64) (int, error) {
	return f.Flash.ReadAt(p[:len(p)-1], off)
}
func (f shortFlash) WriteAt(p []byte, off int64) (int, error) {
	return f.Flash.WriteAt(p[:len(p)-1], off)
}

func TestHealthStale(t *testing.T) {
	d := newDevice(t, geometries[0], 3)
	r := d.record(t)
	require.NoError(t, r.Store(t.Context(), state(1)))
	d.poke(t, 2, encoded(t, 1, state(3)))
	_, err := r.Load(t.Context())
	require.NoError(t, err)
	h := r.Health()
	require.Equal(t, 2, h.Good)
	require.ErrorContains(t, h.Errs[2], "older")
	h.Errs[0] = io.EOF // a copy
	require.NoError(t, r.Health().Errs[0])
}

// TestHiddenWrite: a write was cut off and its copy can be neither read nor
// written for a while. When it is back it must not win over what was acted on.
func TestHiddenWrite(t *testing.T) {
	ctx := t.Context()
	for _, gap := range []uint64{1, 2} {
		for i := range 3 {
			for _, store := range []bool{false, true} {
				d := newDevice(t, geometries[0], 3)
				require.NoError(t, d.record(t).Store(ctx, state(1)))
				rec, _, err := decode(d.peek(t, 0))
				require.NoError(t, err)
				d.poke(t, i, encoded(t, rec.gen+gap, state(2)))
				dead := []memflash.Fault{
					d.at(i, memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead}),
					d.at(i, memflash.Fault{Kind: memflash.Fail, On: memflash.OpWrite | memflash.OpErase}),
				}
				d.chip.Plan(dead...)
				want := state(1)
				s, err := d.record(t).Heal(ctx)
				require.NoError(t, err)
				requireState(t, want, s)
				if store {
					want = state(3)
					require.NoError(t, d.record(t).Store(ctx, want))
				}
				// Not by a vote of the others: one of them may be bad by then.
				now, _, err := decode(d.peek(t, (i+1)%3))
				require.NoError(t, err)
				require.Greater(t, now.gen, rec.gen+gap)
				d.chip.Plan()
				s, err = d.record(t).Heal(ctx)
				require.NoError(t, err)
				requireState(t, want, s)
				d.requireAgree(t, want)
			}
		}
	}
}

// TestDeadCopy: a copy that cannot be written does not wear out the others.
func TestDeadCopy(t *testing.T) {
	ctx := t.Context()
	for k := 3; k <= 4; k++ {
		subsets(k, k-2, func(dead []int) {
			d := newDevice(t, geometries[0], k)
			require.NoError(t, d.record(t).Store(ctx, state(1)))
			var faults []memflash.Fault
			for _, i := range dead {
				d.poke(t, i, []byte("broken"))
				faults = append(faults, d.at(i, memflash.Fault{Kind: memflash.Fail, On: memflash.OpErase}))
			}
			d.chip.Plan(faults...)
			boot := func(want int) *Record {
				r := d.record(t)
				s, err := r.Heal(ctx)
				require.NoError(t, err)
				requireState(t, state(want), s)
				require.Equal(t, 2, r.Health().Good)
				return r
			}
			boot(1)
			wear := d.chip.Wear(0)
			for range 10 {
				boot(1)
			}
			require.Equal(t, wear, d.chip.Wear(0))

			// A Store costs one erasure each, and none if nothing changes.
			require.NoError(t, boot(1).Store(ctx, state(1)))
			require.Equal(t, wear, d.chip.Wear(0))
			require.NoError(t, boot(1).Store(ctx, state(2)))
			require.NoError(t, boot(2).Store(ctx, state(1)))
			for i, n := range d.chip.Wear(0) {
				if wear[i] > 0 && !slices.Contains(dead, i) {
					require.Equal(t, wear[i]+2, n)
				} else {
					require.Equal(t, wear[i], n)
				}
			}
			// It is back: no bytes of the same generation may differ.
			alive := 0
			for slices.Contains(dead, alive) {
				alive++
			}
			before, _, err := decode(d.peek(t, alive))
			require.NoError(t, err)
			require.NotZero(t, before.missing)
			d.chip.Plan()
			s, err := d.record(t).Heal(ctx)
			require.NoError(t, err)
			requireState(t, state(1), s)
			d.requireAgree(t, state(1))
			after, _, err := decode(d.peek(t, 0))
			require.NoError(t, err)
			require.Greater(t, after.gen, before.gen)

			// Only some are back.
			d.chip.Plan(faults...)
			for _, i := range dead {
				d.poke(t, i, []byte("broken"))
			}
			boot(1)
			d.chip.Plan(faults[1:]...)
			r := d.record(t)
			s, err = r.Heal(ctx)
			require.NoError(t, err)
			requireState(t, state(1), s)
			require.Equal(t, 3, r.Health().Good)
		})
	}
}

// TestLastGoodCopy: as long as no write succeeds, the last good copy is kept.
func TestLastGoodCopy(t *testing.T) {
	ctx := t.Context()
	for k := 2; k <= 4; k++ {
		for _, kind := range []memflash.Kind{memflash.Fail, memflash.Skip} {
			d := newDevice(t, geometries[0], k)
			require.NoError(t, d.record(t).Store(ctx, state(1)))
			// Erasing works, writing never.
			d.chip.Plan(memflash.Fault{Kind: kind, On: memflash.OpWrite, Forever: true})
			r := d.record(t)
			err := r.Store(ctx, state(2))
			require.Error(t, err)
			require.ErrorContains(t, err, "last good one")
			requireState(t, state(1), load(t, d))
			for range 3 {
				s, err := d.record(t).Heal(ctx)
				require.NoError(t, err)
				requireState(t, state(1), s)
			}
			d.chip.Plan()
			s, err := r.Heal(ctx)
			require.NoError(t, err)
			requireState(t, state(1), s)
			d.requireAgree(t, state(1))
		}
	}
}

// TestTooFewCopies: a state that only one copy holds is not stored.
func TestTooFewCopies(t *testing.T) {
	for k := 2; k <= 4; k++ {
		for alive := range k {
			d := newDevice(t, geometries[0], k)
			r := d.record(t)
			require.NoError(t, r.Store(t.Context(), state(1)))
			var faults []memflash.Fault
			for i := range k {
				if i != alive {
					faults = append(faults, d.at(i, memflash.Fault{Kind: memflash.Fail, On: memflash.OpWrite | memflash.OpErase}))
				}
			}
			d.chip.Plan(faults...)
			require.ErrorIs(t, r.Store(t.Context(), state(2)), memflash.ErrFault)
			d.chip.Plan()
			s, err := r.Heal(t.Context())
			require.NoError(t, err)
			require.True(t, s.Equal(state(1)) || s.Equal(state(2)))
			d.requireAgree(t, s)
		}
	}
}

func TestOrder(t *testing.T) {
	rec := func(gen uint64) content {
		if gen == 0 {
			return content{err: io.EOF}
		}
		return content{rec: &record{gen: gen}}
	}
	for _, c := range []struct {
		gens []uint64 // 0: damaged
		best int
		want []int
	}{
		{[]uint64{7, 7, 7}, 0, []int{1, 2, 0}},
		{[]uint64{7, 7, 7}, 2, []int{0, 1, 2}},
		{[]uint64{8, 7, 6}, 0, []int{2, 1, 0}},
		{[]uint64{6, 8, 7}, 1, []int{0, 2, 1}},
		{[]uint64{7, 0, 8, 6}, 2, []int{1, 3, 0, 2}},
		{[]uint64{0, 9, 0, 8}, 1, []int{0, 2, 3, 1}},
		{[]uint64{0, 0}, -1, []int{0, 1}},
	} {
		var cs []content
		for _, g := range c.gens {
			cs = append(cs, rec(g))
		}
		var got []int
		for todo := uint8(1<<len(cs) - 1); todo != 0; {
			i := next(cs, todo, c.best)
			got = append(got, i)
			todo &^= 1 << i
		}
		require.Equal(t, c.want, got, "%v", c.gens)
	}
}

// TestOneFault has each operation of a Store and a Heal fail once, or silently do
// nothing, or happen elsewhere.
func TestOneFault(t *testing.T) {
	ctx := t.Context()
	for _, g := range geometries {
		for k := 2; k <= 4; k++ {
			base := newDevice(t, g, k)
			require.NoError(t, base.record(t).Store(ctx, state(1)))
			for _, f := range []memflash.Fault{
				{Kind: memflash.Fail},
				{Kind: memflash.Fail, N: 100, Loss: memflash.LoseAll},
				{Kind: memflash.Fail, N: 16, Loss: memflash.LoseSome},
				{Kind: memflash.Skip},
				{Kind: memflash.Misdirect},
				{Kind: memflash.Fail, On: memflash.OpRead},
				{Kind: memflash.Flip},
				{Kind: memflash.Fail, On: memflash.OpSync, Forever: true},
			} {
				for f.At = 0; ; f.At++ {
					f.Seed = uint64(f.At)
					d := base.clone()
					d.chip.Plan(f)
					r := d.record(t)
					err := r.Store(ctx, state(2))
					if d.chip.Pending() > 0 {
						require.NoError(t, err)
						break
					}
					allowed := []ota.BootState{state(2)}
					if err != nil {
						allowed = append(allowed, state(1))
					}
					d.chip.Plan()
					if k == 2 && f.Kind == memflash.Misdirect {
						continue // two copies at once
					}
					got, err := r.Heal(ctx)
					require.NoError(t, err, "%s, %d copies: %+v", g.name, k, f)
					require.True(t, got.Equal(allowed[0]) || got.Equal(allowed[len(allowed)-1]), "%s, %d copies: %+v", g.name, k, f)
					_, err = d.record(t).Heal(ctx) // an error in the first one costs a copy
					require.NoError(t, err)
					d.requireAgree(t, got)
				}
				require.NotZero(t, f.At)
			}
		}
	}
}

func TestVersionIsLeftAlone(t *testing.T) {
	ctx := t.Context()
	b := body(t, state(5))
	binary.LittleEndian.PutUint16(b[8:], 2)
	future := seal(b)
	for i := range 3 {
		d := newDevice(t, geometries[0], 3)
		require.NoError(t, d.record(t).Store(ctx, state(1)))
		d.poke(t, i, future)
		for j := range 3 {
			if j != i {
				require.NoError(t, d.chip.FlipBit(0, d.off[j]+5, 0))
			}
		}
		for range 2 { // others damaged, then good
			before := d.clone()
			r := d.record(t)
			_, err := r.Load(ctx)
			require.ErrorIs(t, err, ErrVersion)
			_, err = r.Heal(ctx)
			require.ErrorIs(t, err, ErrVersion)
			require.ErrorIs(t, r.Store(ctx, state(2)), ErrVersion)
			require.True(t, before.chip.Equal(d.chip))
			for j := range 3 {
				if j != i {
					require.NoError(t, d.chip.FlipBit(0, d.off[j]+5, 0))
				}
			}
		}
	}

	// It turns up in the middle of a Store.
	d := newDevice(t, geometries[0], 3)
	require.NoError(t, d.record(t).Store(ctx, state(1)))
	d.chip.OnOp(func(op memflash.Op) {
		if op.Kind == memflash.OpErase && op.Off == d.off[1] {
			d.poke(t, 2, future)
		}
	})
	r := d.record(t)
	require.NoError(t, r.Store(ctx, state(2)))
	require.ErrorIs(t, r.Health().Errs[2], ErrVersion)
	require.Equal(t, future, d.peek(t, 2)[:len(future)])
}

func TestExtensionsAreCarriedOver(t *testing.T) {
	ctx := t.Context()
	ext := []byte("\x01\x80\x04\x00new!")
	b := append(body(t, state(1)), ext...)
	b[10] = 9
	d := newDevice(t, geometries[0], 3)
	d.poke(t, 1, seal(b))
	s, err := d.record(t).Heal(ctx)
	require.NoError(t, err)
	requireState(t, state(1), s)
	d.requireAgree(t, state(1))
	require.NoError(t, d.record(t).Store(ctx, state(2)))
	d.requireAgree(t, state(2))
	rec, _, err := decode(d.peek(t, 2))
	require.NoError(t, err)
	require.Equal(t, ext, rec.ext)
	require.EqualValues(t, 9, rec.minor)
}

// TestSameGeneration cannot happen by the protocol; the answer is at least always
// the same.
func TestSameGeneration(t *testing.T) {
	ctx := t.Context()
	for _, c := range []struct {
		states []int
		want   int
	}{
		{[]int{1, 2}, 1}, {[]int{1, 2, 2}, 2}, {[]int{2, 1, 2}, 2}, {[]int{3, 1, 2}, 3}, {[]int{1, 2, 1, 2}, 1}, {[]int{3, 2, 1, 1}, 1},
	} {
		d := newDevice(t, geometries[0], len(c.states))
		for i, n := range c.states {
			d.poke(t, i, encoded(t, 7, state(n)))
		}
		requireState(t, state(c.want), load(t, d))
		s, err := d.record(t).Heal(ctx)
		require.NoError(t, err)
		requireState(t, state(c.want), s)
		d.requireAgree(t, state(c.want))
	}
}

func TestWear(t *testing.T) {
	ctx := t.Context()
	d := newDevice(t, geometries[0], 3)
	r := d.record(t)
	const n = 1000
	for i := range n {
		require.NoError(t, r.Store(ctx, state(i)))
		if i%100 == 0 {
			r = d.record(t)
			s, err := r.Heal(ctx)
			require.NoError(t, err)
			requireState(t, state(i), s)
		}
	}
	require.Equal(t, []int{n, n, n, 0, 0}, d.chip.Wear(0))
	require.NoError(t, d.chip.Err())
	rec, _, err := decode(d.peek(t, 0))
	require.NoError(t, err)
	require.EqualValues(t, n+1, rec.gen) // one more as it began blank
}

func TestContext(t *testing.T) {
	d := newDevice(t, geometries[0], 3)
	r := d.record(t)
	require.NoError(t, r.Store(t.Context(), state(1)))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	before := d.chip.Stats()
	_, err := r.Load(ctx)
	require.ErrorIs(t, err, context.Canceled)
	_, err = r.Heal(ctx)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, r.Store(ctx, state(2)), context.Canceled)
	require.Equal(t, before, d.chip.Stats())

	// At each read and each write: all or nothing.
	for _, kind := range []memflash.OpKind{memflash.OpRead, memflash.OpErase, memflash.OpWrite, memflash.OpSync} {
		for at := 1; at <= 3; at++ {
			for _, heal := range []bool{false, true} {
				d := d.clone()
				d.poke(t, 1, []byte("broken"))
				ctx, cancel := context.WithCancel(t.Context())
				n := 0
				d.chip.OnOp(func(op memflash.Op) {
					if op.Kind == kind {
						if n++; n == at {
							cancel()
						}
					}
				})
				before := d.clone()
				want := state(1)
				if heal {
					_, err = d.record(t).Heal(ctx)
				} else {
					want = state(2)
					err = d.record(t).Store(ctx, want)
				}
				cancel()
				d.chip.OnOp(nil)
				if kind == memflash.OpRead {
					require.ErrorIs(t, err, context.Canceled)
					require.True(t, before.chip.Equal(d.chip))
				} else {
					require.NoError(t, err)
					d.requireAgree(t, want)
				}
			}
		}
	}
}

func TestConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		d := newDevice(t, geometries[0], 3)
		r := d.record(t)
		require.NoError(t, r.Store(ctx, state(0)))
		d.chip.Plan(memflash.Fault{Kind: memflash.Slow, Delay: time.Second, Forever: true})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 1; i <= 20; i++ {
				require.NoError(t, r.Store(ctx, state(i)))
			}
		})
		for range 3 {
			wg.Go(func() {
				for last := uint64(0); last < 20; {
					s, err := r.Load(ctx)
					require.NoError(t, err)
					require.GreaterOrEqual(t, s.Floor, last)
					requireState(t, state(int(s.Floor)), s)
					last = s.Floor
					require.Equal(t, 3, r.Health().Good)
				}
			})
		}
		wg.Go(func() {
			// Whoever waits gives up in time.
			time.Sleep(500 * time.Millisecond)
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			_, err := r.Load(ctx)
			require.ErrorIs(t, err, context.DeadlineExceeded)
		})
		wg.Wait()
		require.NoError(t, d.chip.Err())
	})
}

func BenchmarkStore(b *testing.B) {
	for _, g := range geometries[:6] {
		b.Run(g.name, func(b *testing.B) {
			places, err := Split(memflash.New(g.cfg), 3)
			require.NoError(b, err)
			r, err := New(places, nil)
			require.NoError(b, err)
			s := states()["trial"]
			b.ReportAllocs()
			for b.Loop() {
				s.Tries = (s.Tries + 1) & 0xff
				if err := r.Store(b.Context(), s); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkLoad(b *testing.B) {
	places, err := Split(memflash.New(geometries[0].cfg), 3)
	require.NoError(b, err)
	r, err := New(places, nil)
	require.NoError(b, err)
	require.NoError(b, r.Store(b.Context(), states()["trial"]))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Load(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
