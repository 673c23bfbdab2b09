// Package grub drives GRUB by its environment block. [Mender] does so for systems
// with Mender's scripts, [Driver] with the variables of RAUC's GRUB integration:
//
//	ORDER="B A"   the slots, the best one first
//	B_OK=1        the slot may be started
//	B_TRY=0       how often it was started since it was last confirmed: 0 or 1
//
// GRUB sets <slot>_TRY to 1 before it starts a slot and passes over slots where it
// is 1 already, so a slot has one try (rauc, src/bootloaders/grub.c). grub.cfg in
// this package is a script that does so, see [Script]. A trial is marked by
// ota_trial, which the script need not know.
//
// # What GRUB can do by itself
//
// It goes back after a panic if the kernel has panic=N on its command line, and if
// a kernel cannot be loaded. It starts no watchdog: a hang before any user program
// runs ends only when somebody cuts the power, unless the firmware or a card
// watches. Boots of a committed slot count too, so the counter is reset at every
// start of the daemon (ota.Open does that).
//
// # The file
//
// GRUB writes into the blocks that the file has, and so does this package: a new file
// in its place would be seen too late on file systems with a journal, which GRUB does
// not replay. What is in the first 512 bytes changes at once, because storage writes
// them at once; so all variables must be there, and others that do not fit must go
// ([ErrFull]). The file system must be one that GRUB can write to: no btrfs, ZFS, LVM
// or RAID with redundancy, no compression.
package grub

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/internal/fsys"
)

// Script is a grub.cfg for two slots A and B. It must be completed with where the
// kernels are; see the comments in it.
//
//go:embed grub.cfg
var Script string

const (
	varOrder = "ORDER"
	varTrial = "ota_trial"
)

func okVar(name string) string  { return name + "_OK" }
func tryVar(name string) string { return name + "_TRY" }

// Config configures a [Driver].
type Config struct {
	// Path is that of the environment block; "" means /boot/grub/grubenv. The
	// file must exist: grub-editenv PATH create.
	Path string
	// Names are what the script calls the slots, such as "A" and "B".
	Names []string
	// Running finds the slot that runs. nil means that the script tells the
	// kernel, by the parameter rauc.slot.
	Running func(context.Context) (ota.SlotID, error)

	files fsys.FS
}

// Driver drives a GRUB script; it implements [driver.Driver].
type Driver struct{ c Config }

// New returns a driver.
func New(c *Config) (*Driver, error) {
	d := &Driver{}
	if c != nil {
		d.c = *c
	}
	if d.c.Path == "" {
		d.c.Path = "/boot/grub/grubenv"
	}
	if d.c.files == nil {
		d.c.files = fsys.OS{}
	}
	if len(d.c.Names) < 2 || len(d.c.Names) > ota.MaxSlots {
		return nil, fmt.Errorf("grub: %d slots: %w", len(d.c.Names), ota.ErrInvalid)
	}
	for i, n := range d.c.Names {
		if n == "" || len(n) > 16 || strings.ContainsFunc(n, notWord) || slices.Index(d.c.Names, n) != i {
			return nil, fmt.Errorf("grub: slot %d: name %s: %w", i, ota.Quote(n), ota.ErrInvalid)
		}
	}
	if d.c.Running == nil {
		d.c.Running = driver.RunningFromCmdline("", "rauc.slot", d.c.Names)
	}
	return d, nil
}

// notWord reports whether r cannot be part of a name of a variable.
func notWord(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_')
}

// Capabilities implements [driver.Capable].
func (d *Driver) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "GRUB", MaxTries: 1, ConfirmEveryBoot: true,
		OnPanic: driver.IfReset, OnHang: driver.No, OnUnloadable: driver.Yes,
	}
}

// Running implements [driver.Driver].
func (d *Driver) Running(ctx context.Context) (ota.SlotID, error) { return d.c.Running(ctx) }

func (d *Driver) load(ctx context.Context) (*Block, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	b, err := d.c.files.ReadFile(d.c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("grub: %w: %w (make one with grub-editenv)", ota.ErrNoBootState, err)
	}
	if err != nil {
		return nil, fmt.Errorf("grub: %w", err)
	}
	e, err := ParseBlock(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", ota.Quote(d.c.Path), ota.ErrBadBootState, err)
	}
	return e, nil
}

// Read implements [driver.Driver].
func (d *Driver) Read(ctx context.Context) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	e, err := d.load(ctx)
	if err != nil {
		return c, err
	}
	order, ok := e.Get(varOrder)
	if !ok {
		return c, fmt.Errorf("grub: no variable %s: %w", varOrder, ota.ErrNoBootState)
	}
	trial, _ := e.Get(varTrial)
	for i, name := range strings.Fields(order) {
		id := ota.SlotID(slices.Index(d.c.Names, name))
		if id < 0 {
			return c, fmt.Errorf("grub: variable %s: no slot %s: %w", varOrder, ota.Quote(name), ota.ErrBadBootState)
		}
		good, _ := e.Get(okVar(name))
		try, _ := e.Get(tryVar(name))
		tried := try != "" && try != "0"
		switch {
		case good != "1":
		case c.Trial:
			c.Revert = id
			return c, nil
		case i == 0 && name == trial:
			c.Active, c.Trial, c.Booted = id, true, tried
			if !tried {
				c.Tries = 1
			}
		default:
			// The script forgets the tries when there is nothing else.
			c.Active, c.Worn = id, tried
			return c, nil
		}
	}
	if c.Active == ota.NoSlot {
		return c, fmt.Errorf("grub: %s is %s, and none of them may be started: %w", varOrder, ota.Quote(order), ota.ErrBadBootState)
	}
	return c, nil
}

// Write implements [driver.Driver].
func (d *Driver) Write(ctx context.Context, c driver.Choice) error {
	if c.Active < 0 || int(c.Active) >= len(d.c.Names) || int(c.Revert) >= len(d.c.Names) || c.Trial && c.Revert < 0 {
		return fmt.Errorf("grub: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	}
	if c.Tries < 0 || c.Tries > 1 {
		return fmt.Errorf("grub: %d tries: %w", c.Tries, ota.ErrInvalid)
	}
	e, err := d.load(ctx)
	if err != nil {
		return err
	}
	old, err := e.Bytes()
	if err != nil {
		return err
	}
	set := func(name, value string) {
		if err == nil {
			err = e.Set(name, value)
		}
	}
	active := d.c.Names[c.Active]
	// A slot that is not in the order is no reserve: it may hold half an image.
	order := active
	for _, n := range d.c.Names {
		set(okVar(n), "0")
		set(tryVar(n), "0")
	}
	set(okVar(active), "1")
	e.Unset(varTrial)
	if c.Trial {
		revert := d.c.Names[c.Revert]
		order += " " + revert
		set(okVar(revert), "1")
		set(varTrial, active)
		if c.Booted || c.Tries == 0 {
			set(tryVar(active), "1")
		}
	}
	set(varOrder, order)
	if err != nil {
		return err
	}
	b, err := e.Bytes()
	if err != nil {
		return err
	}
	if slices.Equal(b, old) {
		return nil
	}
	if used(b) > fsys.Sector || used(old) > fsys.Sector {
		return fmt.Errorf("grub: %d bytes of variables, %d before: only the first %d can be written at once: %w", used(b), used(old), fsys.Sector, ErrFull)
	}
	if err := d.c.files.Overwrite(d.c.Path, b); err != nil {
		return fmt.Errorf("grub: %w", err)
	}
	got, err := d.c.files.ReadFile(d.c.Path)
	if err == nil && !slices.Equal(got, b) {
		err = ota.ErrVerify
	}
	if err != nil {
		return fmt.Errorf("grub: reading %s back: %w", ota.Quote(d.c.Path), err)
	}
	return nil
}
