package statemachine_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/slotota/ota/interop/statemachine"
)

// Sequences at which the device, or the model, was wrong once. Each step is
// compared with the model.
func TestPastFailures(t *testing.T) {
	type steps []func(*statemachine.Machine) error
	update := func(v int, timeout time.Duration) func(*statemachine.Machine) error {
		return func(m *statemachine.Machine) error {
			return m.Update(statemachine.Image{Version: v}, timeout, false)
		}
	}
	reboot := func(m *statemachine.Machine) error { return m.Reboot(false, memflash.LoseAll, 0) }
	revert := (*statemachine.Machine).Revert
	commit := func(m *statemachine.Machine) error { return m.Commit(0) }
	no, one := false, ota.SlotID(1)
	for name, s := range map[string]steps{
		// Going back commits: not what was never committed.
		"back to firmware never committed": {
			update(2, 0), reboot, revert, reboot,
			func(m *statemachine.Machine) error {
				return m.SetBootState(ota.BootStatePatch{Committed: &no, Revert: &one})
			},
			reboot,
		},
		// The firmware that runs and is committed stays so.
		"trial of the running firmware called off": {
			update(2, 0), reboot, commit,
			func(m *statemachine.Machine) error { return m.Snapshot(true, 0) },
			revert, reboot, update(3, 0),
		},
		"damaged push of what is in place": {
			update(2, 0), reboot, revert, reboot,
			func(m *statemachine.Machine) error {
				return m.Push(statemachine.Image{Version: 2, Fault: statemachine.WrongDigest}, 0, 700)
			},
			update(2, 0), reboot, commit,
		},
	} {
		for _, g := range geometries() {
			t.Run(name+"/"+g.Name, func(t *testing.T) {
				m, err := statemachine.New(statemachine.Config{Geometry: g})
				require.NoError(t, err)
				for i, step := range s {
					require.NoErrorf(t, step(m), "step %d", i)
				}
				require.NoError(t, m.Settle())
				require.NoError(t, m.Close())
			})
		}
	}
}

// Watch that commits or reverts by itself loses its power anywhere.
func TestWatchCut(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Minute} {
		for n := range 12 {
			for mode := range memflash.TearModes(0) {
				m, err := statemachine.New(statemachine.Config{Geometry: sim.Geometries()[0]})
				require.NoError(t, err)
				require.NoError(t, m.Update(statemachine.Image{Version: 2}, timeout, false))
				require.NoError(t, m.Reboot(true, 0, 0))
				at := fmt.Sprintf("timeout %v, operation %d, mode %d", timeout, n, mode)
				require.True(t, m.Cut(n, mode, uint64(n)), at)
				m.Wait(timeout)
				require.NoError(t, m.Watch(), at)
				require.NoError(t, m.Settle(), at)
				require.Equal(t, n < 9, m.Stats().Cuts > 0, at) // it erases, writes and syncs 3 copies
				require.NoError(t, m.Close())
			}
		}
	}
}
