package mongoose

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

// RBootSize is the number of bytes of an [RBootConfig] without its checksum.
const RBootSize = 80

// RBootMergeFS is the flag of RBootConfig.UserFlags that has the firmware take over
// files of the old file system.
const RBootMergeFS = 1

const (
	rbootMagic = 0xe1
	rbootSeed  = 0xef
)

// RBootConfig is rBoot's configuration: rboot_config with the additions of Mongoose
// OS, little-endian.
type RBootConfig struct {
	Mode      uint8 // 0 standard, 1 GPIO
	Current   uint8 // the ROM to start
	GPIO      uint8
	Count     uint8 // of ROMs, mostly 2
	Previous  uint8 // where to go back to
	FirstBoot uint8 // the loader counts Attempts
	Attempts  uint8
	Updated   uint8    // fw_updated: Current is not committed
	Pad       [2]uint8 //
	ROMs      [4]uint32
	ROMSizes  [4]uint32
	FS        [4]uint32
	FSSizes   [4]uint32
	UserFlags uint32
}

// ParseRBoot reads a configuration from the start of b; checksum says that one
// follows. Errors wrap [ErrRecord].
func ParseRBoot(b []byte, checksum bool) (c RBootConfig, err error) {
	n := RBootSize
	if checksum {
		n++
	}
	switch {
	case len(b) < n:
		return c, fmt.Errorf("mongoose: rBoot configuration of %d bytes: %w", len(b), ErrRecord)
	case b[0] != rbootMagic || b[1] != 1:
		return c, fmt.Errorf("mongoose: rBoot magic number %#02x, version %d: %w", b[0], b[1], ErrRecord)
	case checksum && b[RBootSize] != xor(b[:RBootSize]):
		return c, fmt.Errorf("mongoose: rBoot configuration: bad checksum: %w", ErrRecord)
	}
	c = RBootConfig{Mode: b[2], Current: b[3], GPIO: b[4], Count: b[5], Previous: b[6], FirstBoot: b[7], Attempts: b[8], Updated: b[9], Pad: [2]uint8(b[10:])}
	off := 12
	for _, list := range []*[4]uint32{&c.ROMs, &c.ROMSizes, &c.FS, &c.FSSizes} {
		for i := range list {
			list[i] = binary.LittleEndian.Uint32(b[off:])
			off += 4
		}
	}
	c.UserFlags = binary.LittleEndian.Uint32(b[off:])
	return c, nil
}

// Bytes returns the configuration, with a checksum if there is to be one.
func (c *RBootConfig) Bytes(checksum bool) []byte {
	b := []byte{rbootMagic, 1, c.Mode, c.Current, c.GPIO, c.Count, c.Previous, c.FirstBoot, c.Attempts, c.Updated, c.Pad[0], c.Pad[1]}
	for _, list := range [][4]uint32{c.ROMs, c.ROMSizes, c.FS, c.FSSizes} {
		for _, v := range list {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
	}
	b = binary.LittleEndian.AppendUint32(b, c.UserFlags)
	if checksum {
		b = append(b, xor(b))
	}
	return b
}

func xor(b []byte) byte {
	x := byte(rbootSeed)
	for _, c := range b {
		x ^= c
	}
	return x
}

// ErrSingle says that rBoot's only record cannot be replaced atomically.
var ErrSingle = errors.New("rBoot keeps one record: a power cut while it is written makes the loader start ROM 0")

// RBootOptions configure an [RBoot].
type RBootOptions struct {
	// Sector is that of the configuration: at 0x1000 or 0x7000 of the flash.
	Sector ota.Flash
	// Checksum says that the loader was built with BOOT_CONFIG_CHKSUM.
	Checksum bool
	// Default is what the loader was built to start from if the sector holds
	// nothing. With it a sector that holds nothing is read as the loader reads
	// it; without it, that is an error.
	Default *RBootConfig
	// MergeFS has firmware on trial take over the files of the old one.
	MergeFS bool
	// AllowSingle allows to write the sector although a power cut then lets the
	// loader start ROM 0, as if it were committed.
	AllowSingle bool
	// Running finds the slot that runs. It is required.
	Running func(context.Context) (ota.SlotID, error)
}

// RBoot drives rBoot; it implements [driver.Driver]. Slots are ROMs.
type RBoot struct{ o RBootOptions }

// NewRBoot returns a driver. Errors wrap [ota.ErrInvalid].
func NewRBoot(o *RBootOptions) (*RBoot, error) {
	if o == nil || o.Running == nil || o.Sector == nil {
		return nil, fmt.Errorf("mongoose: need the sector of rBoot and a way to find the running slot: %w", ota.ErrInvalid)
	}
	f := o.Sector
	if w := ota.WriteSize(f); f.Size() < RBootSize+w || f.Size()%w != 0 || ota.ErasedByte(f) != 0xff {
		return nil, fmt.Errorf("mongoose: rBoot sector of %d bytes, write unit %d, erased %#02x: %w", f.Size(), w, ota.ErasedByte(f), ota.ErrInvalid)
	}
	return &RBoot{*o}, nil
}

// Capabilities implements [driver.Capable].
func (d *RBoot) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "rBoot", MaxTries: 1, Copies: 1,
		OnPanic: driver.Yes, OnHang: driver.Watchdog, OnUnloadable: driver.Yes,
		Note: ErrSingle.Error() + ".",
	}
}

// Running implements [driver.Driver].
func (d *RBoot) Running(ctx context.Context) (ota.SlotID, error) { return d.o.Running(ctx) }

// Config returns what the loader starts from.
func (d *RBoot) Config(ctx context.Context) (RBootConfig, error) {
	if err := ctx.Err(); err != nil {
		return RBootConfig{}, err
	}
	b := make([]byte, RBootSize+1)
	if err := readFull(d.o.Sector, b, 0); err != nil {
		return RBootConfig{}, fmt.Errorf("mongoose: rBoot sector: %w", err)
	}
	c, err := ParseRBoot(b, d.o.Checksum)
	switch {
	case err == nil:
		if c.Count < 1 || int(c.Count) > len(c.ROMs) {
			return c, fmt.Errorf("mongoose: rBoot has %d ROMs: %w: %w", c.Count, ErrRecord, ota.ErrBadBootState)
		}
		return c, nil
	case d.o.Default != nil:
		return *d.o.Default, nil
	case bytes.Count(b, []byte{0xff}) == len(b):
		return c, fmt.Errorf("%w: %w", err, ota.ErrNoBootState)
	}
	return c, fmt.Errorf("%w: %w", err, ota.ErrBadBootState)
}

// Read implements [driver.Driver].
func (d *RBoot) Read(ctx context.Context) (driver.Choice, error) {
	c, err := d.Config(ctx)
	if err != nil {
		return driver.Choice{}, err
	}
	marks := c.FirstBoot != 0 || c.Attempts != 0 || c.Updated != 0
	switch {
	case c.Current >= c.Count:
		// The loader starts ROM 0 then, and forgets the rest.
		return driver.Choice{Revert: ota.NoSlot, Worn: true}, nil
	case c.Updated == 0:
		return driver.Choice{Active: ota.SlotID(c.Current), Revert: ota.NoSlot, Worn: marks}, nil
	}
	ch := driver.Choice{Active: ota.SlotID(c.Current), Trial: true, Revert: ota.NoSlot}
	if c.Previous < c.Count && c.Previous != c.Current {
		ch.Revert = ota.SlotID(c.Previous)
	}
	if c.FirstBoot != 0 && c.Attempts == 0 {
		ch.Tries = 1
	} else {
		ch.Booted = true
	}
	return ch, nil
}

// Write implements [driver.Driver]. The error wraps [ErrSingle] without
// RBootOptions.AllowSingle.
func (d *RBoot) Write(ctx context.Context, ch driver.Choice) error {
	c, err := d.Config(ctx)
	if errors.Is(err, ota.ErrBadBootState) && d.o.Default != nil {
		c, err = *d.o.Default, nil
	}
	if err != nil {
		return err
	}
	known := func(id ota.SlotID) bool { return id >= 0 && int(id) < int(c.Count) }
	switch {
	case !known(ch.Active) || ch.Trial && (!known(ch.Revert) || ch.Active == ch.Revert):
		return fmt.Errorf("mongoose: active slot %d, revert slot %d of %d: %w", ch.Active, ch.Revert, c.Count, ota.ErrUnknownSlot)
	case ch.Tries < 0 || ch.Tries > 1:
		return fmt.Errorf("mongoose: %d tries: %w", ch.Tries, ota.ErrInvalid)
	}
	// A rollback leaves marks behind, see the package's documentation.
	c.Current, c.FirstBoot, c.Attempts, c.Updated = uint8(ch.Active), 0, 0, 0
	switch {
	case !ch.Trial:
		c.UserFlags &^= RBootMergeFS
	case ch.Booted || ch.Tries == 0:
		c.Previous, c.FirstBoot, c.Attempts, c.Updated = uint8(ch.Revert), 1, 1, 1
	default:
		c.Previous, c.FirstBoot, c.Updated = uint8(ch.Revert), 1, 1
		c.UserFlags &^= RBootMergeFS
		if d.o.MergeFS {
			c.UserFlags |= RBootMergeFS
		}
	}
	return d.put(c.Bytes(d.o.Checksum))
}

// put replaces the record, its magic number last, and reads it back.
func (d *RBoot) put(b []byte) error {
	f := d.o.Sector
	w := ota.WriteSize(f)
	for int64(len(b))%w != 0 {
		b = append(b, 0xff)
	}
	got := make([]byte, len(b))
	if err := readFull(f, got, 0); err == nil && bytes.Equal(got, b) {
		return nil
	}
	if !d.o.AllowSingle {
		return fmt.Errorf("mongoose: %w", ErrSingle)
	}
	check := func(from int64) func() error {
		return func() error {
			err := readFull(f, got, 0)
			if err == nil && !bytes.Equal(got[from:], b[from:]) {
				err = ota.ErrVerify
			}
			return err
		}
	}
	steps := []func() error{
		func() error {
			if e, ok := f.(ota.Eraser); ok {
				_, n := ota.EraseUnit(f, 0)
				return e.Erase(0, n)
			}
			_, err := f.WriteAt(bytes.Repeat([]byte{0xff}, len(b)), 0)
			return err
		},
		func() error { _, err := f.WriteAt(b[w:], w); return err },
		check(w),
		func() error { _, err := f.WriteAt(b[:w], 0); return err },
		check(0),
	}
	for _, step := range steps {
		err := step()
		if err == nil {
			err = f.Sync()
		}
		if err != nil {
			return fmt.Errorf("mongoose: rBoot sector: %w", err)
		}
	}
	return nil
}
