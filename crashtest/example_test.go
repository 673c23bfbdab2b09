package crashtest_test

import (
	"context"
	"fmt"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
)

// open is the bootloader under test, as it is after a reset.
func open(chip *memflash.Chip) (ota.Bootloader, error) {
	return bootrecord.New(chip.Flashes(), nil)
}

// Whatever interrupts the storing of a state, the old or the new one is found.
func Example() {
	ctx := context.Background()
	older := ota.BootState{Active: 0, Committed: true, Revert: ota.NoSlot}
	newer := ota.BootState{Active: 1, Revert: 0, Tries: 1}

	var scenarios []crashtest.Scenario
	for _, g := range crashtest.Geometries() {
		place := g.Config(bootrecord.MaxSize)
		base := memflash.NewChip(place, place, place)
		b, err := open(base)
		if err == nil {
			err = b.Store(ctx, older)
		}
		if err != nil {
			fmt.Println(err)
			return
		}
		scenarios = append(scenarios, crashtest.Scenario{
			Name: g.Name + "/store",
			New: func(context.Context) (*crashtest.Device, error) {
				chip := base.Clone()
				stored := false
				return &crashtest.Device{
					Chip: chip,
					Run: func(ctx context.Context) error {
						b, err := open(chip)
						if err != nil {
							return err
						}
						err = b.Store(ctx, newer)
						stored = err == nil
						return err
					},
					Check: func(ctx context.Context) error {
						b, err := open(chip)
						if err != nil {
							return err
						}
						s, err := b.(ota.Healer).Heal(ctx)
						if err != nil {
							return err
						}
						if s.Equal(newer) || s.Equal(older) && !stored {
							return nil
						}
						return fmt.Errorf("found %+v: %w", s, crashtest.ErrViolation)
					},
				}, nil
			},
		})
	}

	runs := 0
	for _, s := range scenarios { // in a test: crashtest.Run(t, scenarios, nil)
		r, err := crashtest.Explore(ctx, s, nil)
		if err != nil {
			fmt.Println(err)
		}
		runs += r.Total()
	}
	fmt.Println(len(scenarios), "geometries,", runs, "runs")
	// Output: 6 geometries, 384 runs
}
