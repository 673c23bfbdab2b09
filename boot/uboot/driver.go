package uboot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

// Scheme is how boot scripts use variables to choose a slot.
type Scheme uint8

// The schemes.
const (
	// RAUC is the scheme of RAUC's boot scripts: BOOT_ORDER lists slots by
	// name, the best one first, and BOOT_<name>_LEFT counts down at every boot,
	// in hexadecimal digits (rauc, src/bootloaders/uboot.c,
	// contrib/uboot.sh). It works with every U-Boot whose environment can be
	// saved. A trial is marked by ota_trial, which the script need not know.
	RAUC Scheme = iota
	// Bootcount is U-Boot's own boot counter: upgrade_available, bootcount,
	// bootlimit and altbootcmd (u-boot, doc/api/bootcount.rst). The slot is in
	// the variable Config.Variable; the script in altbootcmd must set it to
	// ota_revert and upgrade_available to 0.
	Bootcount
	// Mender is the scheme of Mender's integration: like Bootcount, with
	// mender_boot_part and mender_boot_part_hex; altbootcmd changes to the other
	// of two partitions (mender, support/modules/rootfs-image).
	Mender
)

// Variables of the schemes.
const (
	varOrder   = "BOOT_ORDER"
	varTrial   = "ota_trial"
	varTries   = "ota_tries" // how many the trial began with, in hexadecimal digits
	varRevert  = "ota_revert"
	varUpgrade = "upgrade_available"
	varCount   = "bootcount"
	varLimit   = "bootlimit"
	varPart    = "mender_boot_part"
	varPartHex = "mender_boot_part_hex"
)

// defaultTries is what a committed slot has in the RAUC scheme (rauc,
// src/bootchooser.c).
const defaultTries = 3

// DriverConfig configures a [Driver].
type DriverConfig struct {
	// Scheme is that of the boot script.
	Scheme Scheme
	// Names are what the environment calls the slots: "A" and "B" (RAUC), the
	// numbers of partitions (Mender), anything (Bootcount).
	Names []string
	// Variable holds the name of the slot in the scheme Bootcount; "" means
	// ota_slot.
	Variable string
	// Running finds the slot that runs. nil means that the boot script tells
	// the kernel, by the parameter rauc.slot (RAUC) or ota.slot.
	Running func(context.Context) (ota.SlotID, error)
}

// Driver drives a boot script of U-Boot; it implements [driver.Driver]. All
// variables that a change concerns are written in one step.
type Driver struct {
	env *Env
	c   DriverConfig
}

// NewDriver returns a driver for the boot script that uses env.
func NewDriver(env *Env, c *DriverConfig) (*Driver, error) {
	d := &Driver{env: env}
	if c != nil {
		d.c = *c
	}
	if d.c.Variable == "" {
		d.c.Variable = "ota_slot"
	}
	if d.c.Scheme > Mender || len(d.c.Names) < 2 || len(d.c.Names) > ota.MaxSlots {
		return nil, fmt.Errorf("uboot: scheme %d with %d slots: %w", d.c.Scheme, len(d.c.Names), ota.ErrInvalid)
	}
	for i, n := range d.c.Names {
		bad := n == "" || strings.ContainsAny(n, " =\x00") || slices.Index(d.c.Names, n) != i
		if d.c.Scheme == Mender {
			v, err := strconv.ParseUint(n, 10, 16)
			bad = bad || err != nil || v == 0 || strconv.FormatUint(v, 10) != n
		}
		if bad {
			return nil, fmt.Errorf("uboot: slot %d: name %s: %w", i, ota.Quote(n), ota.ErrInvalid)
		}
	}
	if d.c.Scheme == Mender && len(d.c.Names) != 2 {
		return nil, fmt.Errorf("uboot: Mender's scheme has two slots, not %d: %w", len(d.c.Names), ota.ErrInvalid)
	}
	if d.c.Running == nil {
		key := "ota.slot"
		if d.c.Scheme == RAUC {
			key = "rauc.slot"
		}
		d.c.Running = driver.RunningFromCmdline("", key, d.c.Names)
	}
	return d, nil
}

// Capabilities implements [driver.Capable].
func (d *Driver) Capabilities() driver.Capabilities {
	c := driver.Capabilities{
		Loader:       "U-Boot",
		Copies:       len(d.env.copies),
		OnPanic:      driver.IfReset,
		OnHang:       driver.Watchdog,
		OnUnloadable: driver.Yes,
		Note:         "A hang before any user program runs ends only if U-Boot itself starts a hardware watchdog.",
	}
	switch d.c.Scheme {
	case RAUC:
		c.ConfirmEveryBoot = true
	case Mender:
		c.MaxTries = 1
	}
	return c
}

// Running implements [driver.Driver].
func (d *Driver) Running(ctx context.Context) (ota.SlotID, error) { return d.c.Running(ctx) }

// Read implements [driver.Driver].
func (d *Driver) Read(ctx context.Context) (driver.Choice, error) {
	v, err := d.env.Read(ctx)
	if errors.Is(err, ErrNoEnvironment) {
		return driver.Choice{}, fmt.Errorf("%w: %w", ota.ErrBadBootState, err)
	}
	if err != nil {
		return driver.Choice{}, err
	}
	if d.c.Scheme == RAUC {
		return d.readOrder(v)
	}
	return d.readCount(v)
}

// slot returns the number of the slot of that name.
func (d *Driver) slot(variable, name string) (ota.SlotID, error) {
	id := slices.Index(d.c.Names, name)
	if id < 0 {
		return ota.NoSlot, fmt.Errorf("uboot: variable %s: no slot %s: %w", variable, ota.Quote(name), ota.ErrBadBootState)
	}
	return ota.SlotID(id), nil
}

// number reads a variable that counts. One that is not set counts 0, as in
// U-Boot.
func number(v Vars, name string, base int) (int, error) {
	s, ok := v.Get(name)
	if !ok || s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(s, "0x"), base, 16)
	if err != nil {
		return 0, fmt.Errorf("uboot: variable %s is %s: %w", name, ota.Quote(s), ota.ErrBadBootState)
	}
	return int(n), nil
}

func leftVar(name string) string { return "BOOT_" + name + "_LEFT" }

func (d *Driver) readOrder(v Vars) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	order, ok := v.Get(varOrder)
	if !ok {
		return c, fmt.Errorf("uboot: no variable %s: %w", varOrder, ota.ErrNoBootState)
	}
	trial, _ := v.Get(varTrial)
	for i, name := range strings.Fields(order) {
		id, err := d.slot(varOrder, name)
		if err != nil {
			return c, err
		}
		left, err := number(v, leftVar(name), 16)
		if err != nil {
			return c, err
		}
		switch {
		case c.Trial:
			c.Revert = id
			return c, nil
		case i == 0 && name == trial:
			// Reported even if it is used up.
			limit, err := number(v, varTries, 16)
			if err != nil {
				return c, err
			}
			c = driver.Choice{Active: id, Trial: true, Revert: ota.NoSlot, Tries: left, Booted: left < limit}
		case left > 0:
			c.Active, c.Worn = id, left < defaultTries
			return c, nil
		}
	}
	if c.Active == ota.NoSlot {
		return c, fmt.Errorf("uboot: %s is %s, and no slot has a boot left: %w", varOrder, ota.Quote(order), ota.ErrBadBootState)
	}
	return c, nil
}

func (d *Driver) readCount(v Vars) (driver.Choice, error) {
	c := driver.Choice{Revert: ota.NoSlot}
	variable := d.c.Variable
	if d.c.Scheme == Mender {
		variable = varPart
	}
	name, ok := v.Get(variable)
	if !ok {
		return c, fmt.Errorf("uboot: no variable %s: %w", variable, ota.ErrNoBootState)
	}
	var err error
	if c.Active, err = d.slot(variable, name); err != nil {
		return c, err
	}
	if up, _ := v.Get(varUpgrade); up != "1" {
		return c, nil
	}
	c.Trial = true
	if d.c.Scheme == Mender {
		c.Revert = 1 - c.Active
	} else if name, ok := v.Get(varRevert); ok {
		if c.Revert, err = d.slot(varRevert, name); err != nil {
			return c, err
		}
	}
	count, err := number(v, varCount, 10)
	if err != nil {
		return c, err
	}
	limit, err := number(v, varLimit, 10)
	if err != nil {
		return c, err
	}
	if d.c.Scheme == Mender {
		limit = 1
	}
	c.Booted, c.Tries = count > 0, max(limit-count, 0)
	return c, nil
}

// Write implements [driver.Driver].
func (d *Driver) Write(ctx context.Context, c driver.Choice) error {
	if int(c.Active) >= len(d.c.Names) || int(c.Revert) >= len(d.c.Names) || c.Active < 0 || c.Trial && c.Revert < 0 {
		return fmt.Errorf("uboot: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	}
	if c.Tries < 0 || c.Tries > 0xffff {
		return fmt.Errorf("uboot: %d tries: %w", c.Tries, ota.ErrInvalid)
	}
	if d.c.Scheme == RAUC {
		return d.env.Write(ctx, d.orderChanges(c)...)
	}
	return d.env.Write(ctx, d.countChanges(c)...)
}

func (d *Driver) orderChanges(c driver.Choice) []Change {
	name := d.c.Names[c.Active]
	if !c.Trial {
		return []Change{
			Set(varOrder, d.order(c.Active, ota.NoSlot)), Set(leftVar(name), strconv.FormatInt(defaultTries, 16)),
			{Name: varTrial, Unset: true}, {Name: varTries, Unset: true},
		}
	}
	limit := c.Tries
	if c.Booted {
		limit++
	}
	return []Change{
		Set(varOrder, d.order(c.Active, c.Revert)), Set(leftVar(name), strconv.FormatInt(int64(c.Tries), 16)),
		Set(leftVar(d.c.Names[c.Revert]), strconv.FormatInt(defaultTries, 16)),
		Set(varTrial, name), Set(varTries, strconv.FormatInt(int64(limit), 16)),
	}
}

// order lists the two slots that may be started. A slot that is neither is no
// reserve: it may hold half an image.
func (d *Driver) order(first, second ota.SlotID) string {
	if second == ota.NoSlot {
		return d.c.Names[first]
	}
	return d.c.Names[first] + " " + d.c.Names[second]
}

func (d *Driver) countChanges(c driver.Choice) []Change {
	cs := []Change{Set(varUpgrade, "0"), Set(varCount, "0")}
	if c.Trial {
		count, limit := 0, c.Tries
		if c.Booted {
			count, limit = 1, c.Tries+1
		}
		cs = []Change{Set(varUpgrade, "1"), Set(varCount, strconv.Itoa(count))}
		if d.c.Scheme == Bootcount {
			cs = append(cs, Set(varLimit, strconv.Itoa(limit)), Set(varRevert, d.c.Names[c.Revert]))
		}
	}
	name := d.c.Names[c.Active]
	if d.c.Scheme == Bootcount {
		return append(cs, Set(d.c.Variable, name))
	}
	n, _ := strconv.ParseUint(name, 10, 16) // checked by NewDriver
	return append(cs, Set(varPart, name), Set(varPartHex, strconv.FormatUint(n, 16)))
}
