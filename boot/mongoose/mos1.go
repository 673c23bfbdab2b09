package mongoose

import (
	"bytes"
	"context"
	"fmt"
	"math"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

// maxRecords is how many records the loader looks at in a device.
const maxRecords = 32

// MOS1Config configures a [MOS1].
type MOS1Config struct {
	// Devices are bcfg0 and bcfg1.
	Devices [2]ota.Flash
	// Default is written when a first choice is stored and the devices hold no
	// record: the loader's own default, with all slots. nil means that this is an
	// error, as only the loader knows the slots.
	Default *Record
	// App describes the firmware in a slot that is going to be tried, for the
	// loader, which holds the CRC against it. nil leaves what the record says.
	App func(ctx context.Context, slot ota.SlotID) (App, error)
	// MergeFS has firmware on trial take over the files of the old one.
	MergeFS bool
	// Running finds the slot that runs, by the address of the code that
	// executes, for example. It is required.
	Running func(context.Context) (ota.SlotID, error)
}

// MOS1 drives the loader of that name; it implements [driver.Driver].
type MOS1 struct{ c MOS1Config }

// NewMOS1 returns a driver. Errors wrap [ota.ErrInvalid].
func NewMOS1(c *MOS1Config) (*MOS1, error) {
	if c == nil || c.Running == nil || c.Devices[0] == nil || c.Devices[1] == nil {
		return nil, fmt.Errorf("mongoose: need two devices and a way to find the running slot: %w", ota.ErrInvalid)
	}
	for i, f := range c.Devices {
		if w := ota.WriteSize(f); f.Size() < RecordSize || RecordSize%w != 0 || ota.ErasedByte(f) != 0xff {
			return nil, fmt.Errorf("mongoose: bcfg%d: %d bytes, write unit %d, erased %#02x: %w", i, f.Size(), w, ota.ErasedByte(f), ota.ErrInvalid)
		}
	}
	if c.Default != nil {
		if err := c.Default.check(); err != nil {
			return nil, fmt.Errorf("%w: %w", err, ota.ErrInvalid)
		}
	}
	return &MOS1{*c}, nil
}

// Capabilities implements [driver.Capable].
func (d *MOS1) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "Mongoose OS (MOS1)", MaxTries: 1, Copies: 2,
		OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.Yes,
		Note: "The loader's watchdog of 10 s watches the start of the firmware.",
	}
}

// Running implements [driver.Driver].
func (d *MOS1) Running(ctx context.Context) (ota.SlotID, error) { return d.c.Running(ctx) }

// found is where the newest record is, and the next one goes.
type found struct {
	Record
	ok   bool
	dev  int // of the record
	next int // position behind it, -1 if it cannot be written to
	used int // how many devices are not blank
	torn bool
}

// scan finds the newest record as the loader does: it reads each device up to the
// first record that is not sound or not newer than the ones before.
func (d *MOS1) scan(ctx context.Context) (v found, err error) {
	v.next = -1
	for dev, f := range d.c.Devices {
		for i := 0; i < maxRecords && int64(i+1)*RecordSize <= f.Size(); i++ {
			if err := ctx.Err(); err != nil {
				return v, err
			}
			b := make([]byte, RecordSize)
			if err := readFull(f, b, int64(i)*RecordSize); err != nil {
				return v, fmt.Errorf("mongoose: bcfg%d: record %d: %w", dev, i, err)
			}
			blank := bytes.Count(b, []byte{0xff}) == len(b)
			if i == 0 && !blank {
				v.used++
			}
			r, err := ParseRecord(b)
			if err != nil || v.ok && r.Seq <= v.Seq {
				if v.ok && v.dev == dev && v.next == i && !blank {
					v.next, v.torn = -1, true
				}
				break
			}
			v.Record, v.ok, v.dev, v.next, v.torn = r, true, dev, i+1, false
		}
		if v.dev == dev && (v.next >= maxRecords || int64(v.next+1)*RecordSize > f.Size()) {
			v.next = -1
		}
	}
	return v, nil
}

// Record returns the newest record. The error wraps [ota.ErrNoBootState] if there is
// none and none was ever written, [ota.ErrBadBootState] if none is sound.
func (d *MOS1) Record(ctx context.Context) (Record, error) {
	v, err := d.scan(ctx)
	return v.Record, d.usable(v, err)
}

func (d *MOS1) usable(v found, err error) error {
	switch {
	case err != nil:
		return err
	case v.ok:
		return v.check()
	case v.used < 2: // the first write may have been cut off
		return fmt.Errorf("mongoose: no record: %w", ota.ErrNoBootState)
	}
	return fmt.Errorf("mongoose: no sound record: %w", ota.ErrBadBootState)
}

// Read implements [driver.Driver].
func (d *MOS1) Read(ctx context.Context) (driver.Choice, error) {
	r, err := d.Record(ctx)
	if err != nil {
		return driver.Choice{}, err
	}
	return r.choice(), nil
}

func (r *Record) choice() driver.Choice {
	c := driver.Choice{Active: ota.SlotID(r.Active), Revert: ota.NoSlot}
	if r.Flags&Committed != 0 {
		return c
	}
	c.Trial, c.Revert = true, ota.SlotID(r.Revert)
	if r.Flags&FirstBootB != 0 {
		c.Tries = 1
	} else {
		c.Booted = true
	}
	return c
}

// Write implements [driver.Driver]. The error wraps [ota.ErrUnsupported] if the
// loader would move the firmware to another slot.
func (d *MOS1) Write(ctx context.Context, c driver.Choice) error {
	v, err := d.scan(ctx)
	if err = d.usable(v, err); err != nil {
		if d.c.Default == nil || v.ok || ctx.Err() != nil {
			return err
		}
		v.Record = *d.c.Default
	}
	r := v.Record
	known := func(id ota.SlotID) bool { return id >= 0 && int(id) < int(r.NumSlots) }
	switch {
	case !known(c.Active) || c.Trial && (!known(c.Revert) || c.Active == c.Revert):
		return fmt.Errorf("mongoose: active slot %d, revert slot %d of %d: %w", c.Active, c.Revert, r.NumSlots, ota.ErrUnknownSlot)
	case c.Tries < 0 || c.Tries > 1:
		return fmt.Errorf("mongoose: %d tries: %w", c.Tries, ota.ErrInvalid)
	}
	r.Active, r.Revert = int8(c.Active), -1
	if c.Trial {
		if err := d.try(ctx, &r, c); err != nil {
			return err
		}
	} else {
		r.Flags = r.Flags&^(FirstBootA|FirstBootB|MergeFS) | Committed
	}
	if v.ok && r == v.Record {
		return nil
	}
	return d.append(v, r)
}

// try fills in a record for a trial.
func (d *MOS1) try(ctx context.Context, r *Record, c driver.Choice) error {
	r.Revert = int8(c.Revert)
	s := &r.Slots[c.Active]
	if d.c.App != nil && !c.Booted {
		app, err := d.c.App(ctx, c.Active)
		if err != nil {
			return fmt.Errorf("mongoose: slot %d: %w", c.Active, err)
		}
		s.App, s.ErrCount = app, 0
	}
	if s.App.Org != s.AppMapAddr {
		return fmt.Errorf("mongoose: slot %d: firmware linked for %#x in a slot at %#x, which the loader would move: %w", c.Active, s.App.Org, s.AppMapAddr, ota.ErrUnsupported)
	}
	if c.Booted || c.Tries == 0 {
		r.Flags = r.Flags&^(Committed|FirstBootB) | FirstBootA
		return nil
	}
	r.Flags = r.Flags&^(Committed|MergeFS) | FirstBootA | FirstBootB
	if d.c.MergeFS {
		r.Flags |= MergeFS
	}
	return nil
}

// erase erases a device.
func (d *MOS1) erase(dev int) error {
	f := d.c.Devices[dev]
	var err error
	if e, ok := f.(ota.Eraser); ok {
		err = e.Erase(0, f.Size())
	} else {
		// As much as the loader looks at.
		n := min(f.Size()-f.Size()%RecordSize, maxRecords*RecordSize)
		_, err = f.WriteAt(bytes.Repeat([]byte{0xff}, int(n)), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fmt.Errorf("mongoose: bcfg%d: erasing: %w", dev, err)
	}
	return nil
}

// append writes r as the newest record: behind the last one, or else at the start
// of the other device, which holds older ones only.
func (d *MOS1) append(v found, r Record) error {
	step := uint32(1)
	if v.torn {
		step = 2 // past what the torn record may have
	}
	if v.Seq > math.MaxUint32-step-1 {
		return fmt.Errorf("mongoose: no sequence number is left above %d: %w", v.Seq, ota.ErrBadBootState)
	}
	r.Seq = v.Seq + step
	if v.next >= 0 && v.ok {
		if err := d.put(v.dev, v.next, &r); err == nil {
			return nil
		}
		r.Seq++ // what was written may be found one day
	}
	other := 0
	if v.ok {
		other = 1 - v.dev
	}
	if err := d.erase(other); err != nil {
		return err
	}
	return d.put(other, 0, &r)
}

// put writes a record and reads it back.
func (d *MOS1) put(dev, i int, r *Record) error {
	f, b := d.c.Devices[dev], r.Bytes()
	_, err := f.WriteAt(b, int64(i)*RecordSize)
	if err == nil {
		err = f.Sync()
	}
	got := make([]byte, RecordSize)
	if err == nil {
		err = readFull(f, got, int64(i)*RecordSize)
	}
	if err == nil && !bytes.Equal(got, b) {
		err = ota.ErrVerify
	}
	if err != nil {
		return fmt.Errorf("mongoose: bcfg%d: record %d: %w", dev, i, err)
	}
	return nil
}
