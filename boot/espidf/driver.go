package espidf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

const (
	sectorSize = 0x1000 // distance of the two entries
	maxApps    = 16     // OTA partitions of a table
)

// Config configures a [Driver].
type Config struct {
	// OTAData is the otadata partition: at least two sectors of 4096 bytes.
	OTAData ota.Flash
	// Apps is how many OTA partitions there are, at most [ota.MaxSlots]:
	// [Table.Apps].
	Apps int
	// Factory says that there is a factory partition; its slot is number Apps.
	Factory bool
	// PessimisticFirstBoot is for loaders that were built without rollback
	// support: the firmware itself must call [Driver.FirstBoot] before anything
	// else, which makes the next boot go back until the trial is committed. A
	// firmware that does not get that far is tried again at every reset.
	PessimisticFirstBoot bool
	// Running finds the slot that runs, by the address of the code that
	// executes, for example. It is required.
	Running func(context.Context) (ota.SlotID, error)
}

// Driver drives ESP-IDF's loader; it implements [driver.Driver].
type Driver struct{ c Config }

// New returns a driver. Errors wrap [ota.ErrInvalid].
func New(c *Config) (*Driver, error) {
	if c == nil || c.OTAData == nil || c.Running == nil {
		return nil, fmt.Errorf("espidf: need the otadata partition and a way to find the running slot: %w", ota.ErrInvalid)
	}
	slots := c.Apps
	if c.Factory {
		slots++
	}
	if c.Apps < 1 || slots < 2 || slots > ota.MaxSlots {
		return nil, fmt.Errorf("espidf: %d OTA partitions, factory %v: %w", c.Apps, c.Factory, ota.ErrInvalid)
	}
	f := c.OTAData
	w := ota.WriteSize(f)
	bad := f.Size() < 2*sectorSize || sectorSize%w != 0 || w < EntrySize && EntrySize%w != 0
	if _, ok := f.(ota.Eraser); ok {
		for i := range int64(2) {
			start, n := ota.EraseUnit(f, i*sectorSize)
			bad = bad || start != i*sectorSize || n == 0 || sectorSize%n != 0
		}
		bad = bad || ota.ErasedByte(f) != 0xff
	}
	if bad {
		return nil, fmt.Errorf("espidf: otadata needs two sectors of %d bytes that can be erased to 0xff one by one: %w", sectorSize, ota.ErrInvalid)
	}
	return &Driver{*c}, nil
}

// Capabilities implements [driver.Capable].
func (d *Driver) Capabilities() driver.Capabilities {
	c := driver.Capabilities{
		Loader: "ESP-IDF", MaxTries: 1, Copies: 2,
		OnPanic: driver.Yes, OnHang: driver.Watchdog, OnUnloadable: driver.Yes,
		Note: "The loader must be built with CONFIG_BOOTLOADER_APP_ROLLBACK_ENABLE.",
	}
	if d.c.PessimisticFirstBoot {
		c.Note = "Firmware that fails before it calls FirstBoot is tried again at every reset."
	}
	return c
}

// Running implements [driver.Driver].
func (d *Driver) Running(ctx context.Context) (ota.SlotID, error) { return d.c.Running(ctx) }

// factory returns the slot of the factory partition, NoSlot if there is none.
func (d *Driver) factory() ota.SlotID {
	if d.c.Factory {
		return ota.SlotID(d.c.Apps)
	}
	return ota.NoSlot
}

// sectors is what both sectors hold.
type sectors struct {
	e      [2]Entry
	used   int // how many are not blank
	active int // the entry that the loader selects, or -1
}

func (d *Driver) read(ctx context.Context) (v sectors, err error) {
	if err := ctx.Err(); err != nil {
		return v, err
	}
	for i := range v.e {
		b, err := d.readSector(i)
		if err != nil {
			return v, err
		}
		if v.e[i], err = ParseEntry(b); err != nil {
			return v, err
		}
		if !filled(b, 0xff) && !filled(b, 0) {
			v.used++
		}
	}
	v.pick()
	return v, nil
}

// pick finds the entry that the loader selects.
func (v *sectors) pick() {
	v.active = -1
	for i := range v.e {
		if v.e[i].Bootable() && (v.active < 0 || v.e[i].Seq > v.e[v.active].Seq) {
			v.active = i
		}
	}
}

// filled reports whether all bytes of b are c.
func filled(b []byte, c byte) bool { return bytes.Count(b, []byte{c}) == len(b) }

// readSector reads the entry of sector i.
func (d *Driver) readSector(i int) ([]byte, error) {
	b := make([]byte, EntrySize)
	if n, err := d.c.OTAData.ReadAt(b, int64(i)*sectorSize); n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("espidf: otadata sector %d: %w", i, err)
	}
	return b, nil
}

// slot returns the slot that entry i selects.
func (d *Driver) slot(v sectors, i int) ota.SlotID { return ota.SlotID(v.e[i].Slot(d.c.Apps)) }

// fallback returns the slot that the loader goes back to from the entry that is
// active.
func (d *Driver) fallback(v sectors) ota.SlotID {
	if o := 1 - v.active; v.e[o].Bootable() && v.e[o].State != StatePending {
		return d.slot(v, o)
	}
	return d.factory()
}

// Read implements [driver.Driver].
func (d *Driver) Read(ctx context.Context) (driver.Choice, error) {
	v, err := d.read(ctx)
	if err != nil {
		return driver.Choice{}, err
	}
	return d.choice(v)
}

func (d *Driver) choice(v sectors) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	switch {
	case v.active >= 0:
	case d.c.Factory:
		c.Active = d.factory()
		return c, nil
	case v.used < 2:
		// The first write may have been cut off.
		return c, fmt.Errorf("espidf: otadata is empty: %w", ota.ErrNoBootState)
	default:
		return c, fmt.Errorf("espidf: no entry of otadata is valid: states %v and %v: %w", v.e[0].State, v.e[1].State, ota.ErrBadBootState)
	}
	c.Active = d.slot(v, v.active)
	back := d.fallback(v)
	state := v.e[v.active].State
	switch {
	case state.committed():
		// The other sector still selects another slot.
		c.Worn = v.e[1-v.active].Bootable() && d.slot(v, 1-v.active) != c.Active
	case back == c.Active:
		// It is what comes next in any case.
	default:
		c.Trial, c.Revert = true, back
		if state == StateNew {
			c.Tries = 1
		} else {
			c.Booted = true
		}
	}
	return c, nil
}

// Write implements [driver.Driver].
func (d *Driver) Write(ctx context.Context, c driver.Choice) error {
	app := func(id ota.SlotID) bool { return id >= 0 && int(id) < d.c.Apps }
	known := func(id ota.SlotID) bool { return app(id) || d.c.Factory && id == d.factory() }
	switch {
	case !known(c.Active) || c.Trial && (!known(c.Revert) || c.Revert == c.Active):
		return fmt.Errorf("espidf: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	case c.Tries < 0 || c.Tries > 1:
		return fmt.Errorf("espidf: %d tries: %w", c.Tries, ota.ErrInvalid)
	case c.Trial && !app(c.Active):
		return fmt.Errorf("espidf: a trial of the factory partition: %w", ota.ErrUnsupported)
	}
	v, err := d.read(ctx)
	if err != nil {
		return err
	}
	switch {
	case c.Trial:
		err = d.try(&v, c)
	case app(c.Active):
		err = d.settle(&v, c.Active)
	default:
		err = d.settleFactory(&v)
	}
	if err != nil {
		return err
	}
	got, err := d.Read(context.WithoutCancel(ctx))
	if err == nil && (got.Active != c.Active || got.Trial != c.Trial || c.Trial && got.Revert != c.Revert) {
		err = fmt.Errorf("espidf: otadata reads differently from what was written: %w", ota.ErrVerify)
	}
	return err
}

// settle makes slot x what boots, for good.
func (d *Driver) settle(v *sectors, x ota.SlotID) error {
	a := v.active
	switch {
	case a < 0:
		return d.aim(v, 0, x, StateValid, 0)
	case v.e[a].State.committed() && d.slot(*v, a) == x:
	case v.e[a].State.committed(), !v.e[1-a].Bootable():
		// The other sector is not needed to go back to.
		if err := d.aim(v, 1-a, x, StateValid, v.e[a].Seq); err != nil {
			return err
		}
	case d.slot(*v, a) == x:
		// The commit. What the loader goes back to stays until it is complete.
		if err := d.put(v, a, NewEntry(v.e[a].Seq, StateValid)); err != nil {
			return err
		}
	case d.slot(*v, 1-a) == x && v.e[1-a].State.committed():
		// The trial has failed. The entry tells which one.
		return d.put(v, a, NewEntry(v.e[a].Seq, StateInvalid))
	default:
		if err := d.aim(v, a, x, StateValid, v.e[a].Seq); err != nil {
			return err
		}
	}
	if a = v.active; v.e[1-a].Bootable() && d.slot(*v, 1-a) != x {
		return d.aim(v, 1-a, x, StateValid, v.e[a].Seq)
	}
	return nil
}

// settleFactory makes the factory partition what boots.
func (d *Driver) settleFactory(v *sectors) error {
	for v.active >= 0 {
		// The one that is not selected first.
		i := v.active
		if v.e[1-i].Bootable() {
			i = 1 - i
		}
		if err := d.put(v, i, NewEntry(v.e[i].Seq, StateInvalid)); err != nil {
			return err
		}
	}
	return nil
}

// try puts slot c.Active on trial.
func (d *Driver) try(v *sectors, c driver.Choice) error {
	state := StateNew
	if c.Booted || c.Tries == 0 {
		state = StatePending
	}
	if c.Revert == d.factory() {
		i := max(v.active, 0)
		if v.active >= 0 && v.e[i].State.committed() {
			i = 1 - i
		}
		if err := d.aim(v, i, c.Active, state, max(v.seq(0), v.seq(1))); err != nil {
			return err
		}
		if v.e[1-i].Bootable() {
			return d.put(v, 1-i, NewEntry(v.e[1-i].Seq, StateInvalid))
		}
		return nil
	}
	a := v.active
	back := func(i int) bool {
		return v.e[i].Bootable() && v.e[i].State.committed() && d.slot(*v, i) == c.Revert
	}
	switch {
	case a < 0:
		if err := d.aim(v, 0, c.Revert, StateValid, 0); err != nil {
			return err
		}
		return d.aim(v, 1, c.Active, state, v.e[0].Seq)
	case back(a):
		return d.aim(v, 1-a, c.Active, state, v.e[a].Seq)
	case !v.e[a].State.committed() && back(1-a):
		if d.slot(*v, a) == c.Active {
			return d.put(v, a, NewEntry(v.e[a].Seq, state))
		}
		return d.aim(v, a, c.Active, state, v.e[a].Seq)
	}
	// Neither entry is of the slot to go back to. At no time may there be a
	// trial without such an entry: the loader would start its default then.
	if !v.e[a].State.committed() && v.e[1-a].Bootable() {
		// Another trial, with another slot to go back to, which takes over.
		if err := d.aim(v, a, d.slot(*v, 1-a), StateValid, v.e[a].Seq); err != nil {
			return err
		}
	}
	if apps := uint32(d.c.Apps); v.e[a].Seq <= apps {
		// Make room below for the entry to go back to.
		i := a
		if v.e[a].State.committed() {
			i = 1 - a
		}
		if err := d.aim(v, i, d.slot(*v, a), v.e[a].State, v.e[a].Seq+apps); err != nil {
			return err
		}
		a = v.active
	}
	if err := d.aim(v, 1-a, c.Revert, StateValid, v.e[a].Seq-uint32(d.c.Apps)-1); err != nil {
		return err
	}
	return d.aim(v, a, c.Active, state, v.e[a].Seq)
}

// FirstBoot makes the loader go back at the next boot if the firmware that runs is
// on trial. It does nothing without [Config.PessimisticFirstBoot]. Call it as the
// first thing that the firmware does, before ota.Open.
func (d *Driver) FirstBoot(ctx context.Context) error {
	if !d.c.PessimisticFirstBoot {
		return nil
	}
	running, err := d.Running(ctx)
	if err != nil {
		return err
	}
	v, err := d.read(ctx)
	if err != nil {
		return err
	}
	c, err := d.choice(v)
	if err != nil || !c.Trial || c.Active != running {
		return err
	}
	switch c.Revert {
	case ota.NoSlot:
		return fmt.Errorf("espidf: %w", ota.ErrNoRevert)
	case d.factory():
		return d.settleFactory(&v)
	}
	return d.aim(&v, v.active, c.Revert, StateValid, v.e[v.active].Seq)
}

// seq returns the sequence number of entry i as far as it counts.
func (v *sectors) seq(i int) uint32 {
	if v.e[i].Bootable() {
		return v.e[i].Seq
	}
	return 0
}

// aim writes an entry into sector i that selects slot x and is newer than
// above.
func (d *Driver) aim(v *sectors, i int, x ota.SlotID, s State, above uint32) error {
	apps := uint64(d.c.Apps)
	seq := uint64(above) + 1
	seq += (uint64(x) + apps - (seq-1)%apps) % apps
	if seq >= noSeq {
		return fmt.Errorf("espidf: no sequence number is left above %d: erase otadata: %w", above, ota.ErrBadBootState)
	}
	return d.put(v, i, NewEntry(uint32(seq), s))
}

// put writes an entry into sector i, reads it back and notes it in v.
func (d *Driver) put(v *sectors, i int, e Entry) error {
	if v.e[i] == e {
		return nil
	}
	if err := d.program(i, e.Bytes()); err != nil {
		return fmt.Errorf("espidf: otadata sector %d: %w", i, err)
	}
	v.e[i] = e
	v.pick()
	return nil
}

// program erases sector i and writes an entry: the state first, and only when that
// is known to be right the sequence number, which the checksum covers.
func (d *Driver) program(i int, b []byte) error {
	f := d.c.OTAData
	off := int64(i) * sectorSize
	unit := ota.WriteSize(f)
	if pad := int(unit) - len(b); pad > 0 {
		b = append(b, bytes.Repeat([]byte{0xff}, pad)...)
	}
	blank := bytes.Repeat([]byte{0xff}, len(b))
	step := func(want []byte, from, to int64) error {
		if _, err := f.WriteAt(want[from:to], off+from); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		got, err := d.readSector(i)
		if err == nil && !bytes.Equal(got, want[:EntrySize]) {
			err = ota.ErrVerify
		}
		return err
	}
	if er, ok := f.(ota.Eraser); ok {
		if err := er.Erase(off, sectorSize); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	} else if err := step(blank, 0, int64(len(b))); err != nil {
		return err
	}
	head := max(unit, 4)
	if head < EntrySize {
		if err := step(append(blank[:head:head], b[head:]...), head, EntrySize); err != nil {
			return err
		}
	} else {
		head = int64(len(b))
	}
	return step(b, 0, head)
}
