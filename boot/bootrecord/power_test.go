package bootrecord

import (
	"errors"
	"flag"
	"fmt"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

var full = flag.Bool("full", false, "run all combinations of damage, power cuts and geometries")

// some leaves out most of the geometries, unless all are asked for: the first,
// the fourth, … remain.
func some() (gs []geometry) {
	for i, g := range geometries {
		if *full || i%3 == 0 {
			gs = append(gs, g)
		}
	}
	return gs
}

// simulate boots d until all of the states were stored, in order, each at most
// once; a power cut ends a boot. It checks that no boot finds another state than
// the last one known to be stored or one whose Store was cut since. want is what
// is stored at the beginning.
func simulate(t *testing.T, d *device, want ota.BootState, stores []ota.BootState, msg string) {
	t.Helper()
	ctx := t.Context()
	allowed := []ota.BootState{want}
	flash := d.chip.Flashes()[0]
	off := func() bool {
		_, err := flash.ReadAt(make([]byte, 1), 0)
		return errors.Is(err, memflash.ErrPowerOff)
	}
	for boot := 0; ; boot++ {
		if boot > 9 {
			t.Fatalf("%s: no end", msg)
		}
		d.chip.PowerOn()
		r := d.record(t)
		got, err := r.Heal(ctx)
		if off() {
			continue // nothing has acted on it
		}
		if err != nil {
			t.Fatalf("%s: boot %d: %v", msg, boot, err)
		}
		// A copy that was weak must not change its mind.
		again, err := d.record(t).Load(ctx)
		if err != nil || !again.Equal(got) {
			t.Fatalf("%s: boot %d: healed %d, then %d, %v", msg, boot, got.Floor, again.Floor, err)
		}
		ok := false
		for _, s := range allowed {
			ok = ok || s.Equal(got)
		}
		if !ok {
			t.Fatalf("%s: boot %d: found %d", msg, boot, got.Floor)
		}
		allowed = []ota.BootState{got}
		for len(stores) > 0 {
			s := stores[0]
			stores = stores[1:]
			if err := r.Store(ctx, s); err != nil {
				if !off() {
					t.Fatalf("%s: boot %d: %v", msg, boot, err)
				}
				allowed = append(allowed, s)
				break
			}
			allowed = []ota.BootState{s}
		}
		if off() {
			continue
		}
		d.requireAgree(t, allowed[0])
		if err := d.chip.Err(); err != nil {
			t.Fatalf("%s: %v", msg, err)
		}
		return
	}
}

// tears returns all ways to cut the power. Weak bits are few, so that they read
// well half of the time.
func tears(seed uint64) []memflash.Fault {
	fs := memflash.TearModes(seed)
	for i := range fs {
		if fs[i].Kind == memflash.CutWeak {
			fs[i].N = 1 + int64(seed%2)
		}
	}
	return fs
}

// prepare returns a device with n states stored.
func prepare(t *testing.T, g geometry, k, n int) *device {
	t.Helper()
	d := newDevice(t, g, k)
	for i := range n {
		require.NoError(t, d.record(t).Store(t.Context(), state(i+1)))
	}
	return d.clone() // counts from 0
}

// TestPowerCut cuts the power at each operation, in each way.
func TestPowerCut(t *testing.T) {
	runs := 0
	for _, g := range geometries {
		for k := 2; k <= 4; k++ {
			base := prepare(t, g, k, 2)
			seeds := uint64(2)
			if *full {
				seeds = 8
			}
			for seed := range seeds {
				for _, f := range tears(seed) {
					if k == 2 && f.Kind == memflash.CutWeak {
						continue // not promised
					}
					for f.At = 0; ; f.At++ {
						d := base.clone()
						d.chip.Plan(f)
						simulate(t, d, state(2), []ota.BootState{state(3)}, fmt.Sprintf("%s, %d copies, %+v", g.name, k, f))
						runs++
						if d.chip.Pending() > 0 {
							break
						}
					}
				}
			}
		}
	}
	t.Logf("%d runs", runs)
}

// TestPowerCutPairs cuts the power twice: in two of three Stores, or in a Store
// and in the healing after it.
func TestPowerCutPairs(t *testing.T) {
	runs := 0
	for n, g := range geometries {
		for k := 2; k <= 4; k++ {
			if !*full && (k != 3 || n%6 != 0) {
				continue // the first and the last, of 3 copies
			}
			base := prepare(t, g, k, 2)
			stores := []ota.BootState{state(3), state(4), state(5)}
			for i, first := range tears(1) {
				for j, second := range tears(2) {
					if !*full && (i+2*j)%7 != 0 {
						continue
					}
					weak := 0
					for _, f := range []memflash.Fault{first, second} {
						if f.Kind == memflash.CutWeak {
							weak++
						}
					}
					if weak > k-2 {
						continue // not promised
					}
				sweep:
					for first.At = 0; ; first.At++ {
						for second.At = first.At + 1; ; second.At++ {
							d := base.clone()
							d.chip.Plan(first, second)
							simulate(t, d, state(2), stores, fmt.Sprintf("%s, %d copies, %+v, %+v", g.name, k, first, second))
							runs++
							if p := d.chip.Pending(); p == 2 {
								break sweep
							} else if p == 1 {
								break
							}
						}
					}
				}
			}
		}
	}
	t.Logf("%d runs", runs)
}

// TestPowerCutWithDamage cuts the power once, with the copies that may be bad
// being so: for ever dead, or damaged before.
func TestPowerCutWithDamage(t *testing.T) {
	runs := 0
	for _, g := range some() {
		for k := 3; k <= 4; k++ {
			base := prepare(t, g, k, 2)
			for _, f := range tears(3) {
				if f.Kind == memflash.CutWeak && k == 3 {
					continue // would be the second bad copy
				}
				for i := range k {
					if !*full && k == 4 && i%2 == 0 {
						continue
					}
					for f.At = 0; ; f.At++ {
						d := base.clone()
						require.NoError(t, d.chip.FlipBit(0, d.off[i]+33, 3))
						d.chip.Plan(f)
						simulate(t, d, state(2), []ota.BootState{state(3), state(4)}, fmt.Sprintf("%s, %d copies, %d bad, %+v", g.name, k, i, f))
						runs++
						if d.chip.Pending() > 0 {
							break
						}
					}
				}
			}
		}
	}
	t.Logf("%d runs", runs)
}

// TestWeakCopy has one copy that reads valid or not, anew at each read, in the
// old and in the new state, and cuts the power while it is repaired.
func TestWeakCopy(t *testing.T) {
	for _, g := range some() {
		base := prepare(t, g, 3, 2)
		old := prepare(t, g, 3, 1)
		next := prepare(t, g, 3, 3)
		for i := range 3 {
			for name, from := range map[string]*device{"old": old, "same": base, "next": next} {
				for _, f := range tears(5) {
					if f.Kind == memflash.CutWeak {
						continue // would be the second weak copy
					}
					for f.At = 0; ; f.At++ {
						d := base.clone()
						d.poke(t, i, from.peek(t, 0))
						require.NoError(t, d.chip.WeakBit(0, d.off[i]+20, 6))
						if f.At%2 == 1 {
							d.chip.PowerOff(memflash.LoseNone, uint64(f.At)) // other readings
						}
						d.chip.Plan(f)
						msg := fmt.Sprintf("%s, copy %d %s, %+v", g.name, i, name, f)
						want := state(2)
						if name == "next" {
							d.chip.PowerOn()
							// The interrupted one may win, but then for good.
							got, err := d.record(t).Heal(t.Context())
							require.NoError(t, err)
							require.True(t, got.Equal(state(2)) || got.Equal(state(3)), msg)
							if d.chip.Pending() == 0 {
								d.chip.PowerOn()
								got, err = d.record(t).Heal(t.Context())
								require.NoError(t, err)
								require.True(t, got.Equal(state(2)) || got.Equal(state(3)), msg)
							}
							want = got
						}
						simulate(t, d, want, []ota.BootState{state(4)}, msg)
						if d.chip.Pending() > 0 {
							break
						}
					}
				}
			}
		}
	}
}
