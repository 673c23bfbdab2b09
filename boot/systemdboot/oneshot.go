package systemdboot

import (
	"context"
	"fmt"
	"path"
	"slices"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/efi"
)

// OneShot drives systemd-boot by LoaderEntryDefault and LoaderEntryOneShot; it
// implements [driver.Driver].
type OneShot struct{ common }

// NewOneShot returns a driver that leaves the names of entries alone. They must have
// no counters.
func NewOneShot(c *Config) (*OneShot, error) {
	d, err := open(c)
	if err != nil {
		return nil, err
	}
	return &OneShot{d}, nil
}

// Capabilities implements [driver.Capable].
func (d *OneShot) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "systemd-boot, one-shot entry", MaxTries: 1,
		OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.IfReset,
		Note: "The loader arms no watchdog.",
	}
}

// named returns the slot that a variable names, NoSlot if it names none.
func (d *OneShot) named(variable string) (ota.SlotID, error) {
	s, ok, err := d.text(variable)
	if err != nil || !ok {
		return ota.NoSlot, err
	}
	n := ParseName(s)
	if n.Counted || n.Ext != type1Ext && n.Ext != type2Ext {
		return ota.NoSlot, nil
	}
	return d.slot(n.Base), nil
}

// Read implements [driver.Driver].
func (d *OneShot) Read(ctx context.Context) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	if err := ctx.Err(); err != nil {
		return c, err
	}
	always, err := d.named(varDefault)
	if err != nil {
		return c, err
	}
	if always == ota.NoSlot {
		return c, fmt.Errorf("systemdboot: LoaderEntryDefault names no slot: %w", ota.ErrNoBootState)
	}
	c.Active = always
	once, err := d.named(varOneShot)
	if err != nil {
		return c, err
	}
	if once != ota.NoSlot && once != always {
		c = driver.Choice{Active: once, Trial: true, Revert: always, Tries: 1}
	}
	return c, nil
}

// Write implements [driver.Driver]. It changes two variables at most, in an order in
// which the loader acts on the old choice until it acts on the new one.
func (d *OneShot) Write(ctx context.Context, c driver.Choice) error {
	if err := d.validate(c, 1); err != nil {
		return err
	}
	if err := d.require(featureDefault | featureOneShot); err != nil {
		return err
	}
	es, err := d.entries(ctx)
	if err != nil {
		return err
	}
	oldAlways, err := d.named(varDefault)
	if err != nil {
		return err
	}
	oldOnce, err := d.named(varOneShot)
	if err != nil {
		return err
	}
	once, always := ota.NoSlot, c.Active
	if c.Trial {
		always = c.Revert
		if c.Tries > 0 {
			once = c.Active
		}
	}
	ids := make([][]byte, 2) // once, always
	for i, id := range []ota.SlotID{once, always} {
		if id == ota.NoSlot {
			continue
		}
		at := slices.IndexFunc(es, func(e *entry) bool { return e.slot == id && !e.broken })
		if at < 0 || es[at].name.Counted {
			return fmt.Errorf("systemdboot: there is no sound entry %s without counters for slot %d: %w", ota.Quote(d.c.Entries[id]), id, ota.ErrInvalid)
		}
		// In lower case, as the loader compares.
		ids[i] = efi.EncodeString(path.Base(es[at].id()))
	}
	setOnce := func() error {
		switch {
		case once != ota.NoSlot:
			return efi.SetVerified(d.c.Vars, varOneShot, ids[0])
		case oldOnce != ota.NoSlot:
			return efi.DeleteVerified(d.c.Vars, varOneShot)
		}
		return nil // what others want stays
	}
	setAlways := func() error { return efi.SetVerified(d.c.Vars, varDefault, ids[1]) }
	steps := []func() error{setOnce, setAlways}
	if oldAlways == ota.NoSlot || once == ota.NoSlot && oldOnce == always {
		// Nothing to go back to, or the slot to be tried is the one to stay.
		steps = []func() error{setAlways, setOnce}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
