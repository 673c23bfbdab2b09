// Package rpi drives the firmware of the Raspberry Pi by tryboot and autoboot.txt.
//
// Each slot has a boot partition (FAT, with config.txt, cmdline.txt and a kernel).
// The file autoboot.txt, on the first partition of the disk, says which of them the
// firmware takes:
//
//	[all]
//	tryboot_a_b=1
//	boot_partition=2
//	[tryboot]
//	boot_partition=3
//
// The section [tryboot] counts for one boot, if the machine was restarted with the
// argument "0 tryboot" (raspberrypi/documentation, autoboot.adoc; on Raspberry Pi 4
// and newer, with an EEPROM of 2022-10 or newer).
//
// # A trial is not stored
//
// So a trial has two halves. Write prepares autoboot.txt; then the machine has to be
// restarted by [Driver.Reset], which is made for ota.Options.Reset, or with the
// argument that [Driver.Arm] returns. What happens if the power is cut:
//
//   - before or after Write, and before Arm: the old firmware starts, and the trial
//     is still pending. The next Reset begins it.
//   - after Arm, and before the new firmware runs: the old firmware starts. The trial
//     counts as begun and failed, though the new firmware may never have run. The
//     update must be repeated.
//   - while the new firmware runs: the old firmware starts, as it does after every
//     reset without the argument. The trial has failed.
//
// Arm writes that the trial has begun before the restart, as a comment in
// autoboot.txt, since afterwards nothing tells a trial that has failed from one that
// was never begun. An ordinary restart while a trial is pending starts the old
// firmware and leaves the trial pending. A restart by hand, reboot "0 tryboot",
// begins a trial that is found out only while its firmware runs.
//
// If the running slot itself is put on trial, the slot to go back to becomes the
// default at once: it is what starts if the power is cut before Reset.
//
// # What the firmware can do by itself
//
// It goes back after a panic if cmdline.txt has panic=N. It starts no watchdog
// unless config.txt or the kernel does: a hang ends when somebody cuts the power.
// What it does if a kernel on trial cannot be loaded depends on the EEPROM: expect
// that somebody must cut the power, which clears the flag.
//
// # What must be there
//
// The first partition, mounted writable where [Config.File] says; in cmdline.txt of
// each boot partition the root file system of its slot. autoboot.txt is replaced by
// a new file, synced and renamed; other lines in it are kept.
package rpi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/internal/fsys"
)

// RebootArg is the argument of the restart that begins a trial.
const RebootArg = "0 tryboot"

// Config configures a [Driver].
type Config struct {
	// Partitions are the numbers of the slots' boot partitions, from 1.
	Partitions []int
	// File is the path of autoboot.txt; "" means /boot/firmware/autoboot.txt.
	File string
	// DeviceTree is where Linux shows the device tree; "" means
	// /proc/device-tree.
	DeviceTree string
	// BootID is a file that differs between boots; "" means
	// /proc/sys/kernel/random/boot_id.
	BootID string
	// Running finds the slot that runs. nil means that the firmware tells, by
	// chosen/bootloader/partition in the device tree.
	Running func(context.Context) (ota.SlotID, error)

	files  fsys.FS
	reboot func(arg string) error
}

// Driver drives tryboot; it implements [driver.Driver].
type Driver struct{ c Config }

// New returns a driver.
func New(c *Config) (*Driver, error) {
	d := &Driver{}
	if c != nil {
		d.c = *c
	}
	for p, otherwise := range map[*string]string{
		&d.c.File:       "/boot/firmware/autoboot.txt",
		&d.c.DeviceTree: "/proc/device-tree",
		&d.c.BootID:     "/proc/sys/kernel/random/boot_id",
	} {
		if *p == "" {
			*p = otherwise
		}
	}
	if d.c.files == nil {
		d.c.files = fsys.OS{}
	}
	if d.c.reboot == nil {
		d.c.reboot = reboot
	}
	d.c.Partitions = slices.Clone(d.c.Partitions)
	if len(d.c.Partitions) < 2 || len(d.c.Partitions) > ota.MaxSlots {
		return nil, fmt.Errorf("rpi: %d slots: %w", len(d.c.Partitions), ota.ErrInvalid)
	}
	for i, p := range d.c.Partitions {
		if p < 1 || p > 255 || slices.Index(d.c.Partitions, p) != i {
			return nil, fmt.Errorf("rpi: slot %d: partition %d: %w", i, p, ota.ErrInvalid)
		}
	}
	return d, nil
}

// Capabilities implements [driver.Capable].
func (d *Driver) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "Raspberry Pi firmware", MaxTries: 1, RebootArg: RebootArg,
		OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.No,
		Note: "A trial begins only by a restart with the argument.",
	}
}

// slot returns the slot that boots from a partition.
func (d *Driver) slot(partition int) ota.SlotID {
	return ota.SlotID(slices.Index(d.c.Partitions, partition))
}

// property returns a number that the firmware has put into the device tree.
func (d *Driver) property(name string) (uint32, error) {
	p := path.Join(d.c.DeviceTree, "chosen/bootloader", name)
	b, err := d.c.files.ReadFile(p)
	if err == nil && len(b) != 4 {
		err = fmt.Errorf("%s of %d bytes: %w", ota.Quote(p), len(b), ota.ErrUnsupported)
	}
	if err != nil {
		return 0, fmt.Errorf("rpi: %w", err)
	}
	return binary.BigEndian.Uint32(b), nil
}

// Running implements [driver.Driver].
func (d *Driver) Running(ctx context.Context) (ota.SlotID, error) {
	if d.c.Running != nil {
		return d.c.Running(ctx)
	}
	if err := ctx.Err(); err != nil {
		return ota.NoSlot, err
	}
	p, err := d.property("partition")
	if errors.Is(err, fs.ErrNotExist) {
		return ota.NoSlot, fmt.Errorf("%w (is this a Raspberry Pi with a recent EEPROM?): %w", err, ota.ErrUnknownSlot)
	}
	if err != nil {
		return ota.NoSlot, err
	}
	id := ota.NoSlot
	if p <= 255 {
		id = d.slot(int(p))
	}
	if id == ota.NoSlot {
		return id, fmt.Errorf("rpi: the firmware has booted partition %d: %w", p, ota.ErrUnknownSlot)
	}
	return id, nil
}

// What follows the mark in autoboot.txt. After pending comes the boot in which it was
// written.
const (
	pending = "pending"
	begun   = "begun"
)

// load returns autoboot.txt and what it means.
func (d *Driver) load(ctx context.Context) (*Autoboot, driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	if err := ctx.Err(); err != nil {
		return nil, c, err
	}
	b, err := d.c.files.ReadFile(d.c.File)
	if errors.Is(err, fs.ErrNotExist) {
		return &Autoboot{}, c, fmt.Errorf("rpi: %w: %w", ota.ErrNoBootState, err)
	}
	if err != nil {
		return nil, c, fmt.Errorf("rpi: %w", err)
	}
	a, err := ParseAutoboot(b)
	if err != nil {
		return nil, c, fmt.Errorf("%w: %w", ota.ErrBadBootState, err)
	}
	if a.Partition == 0 {
		return a, c, fmt.Errorf("rpi: %s has no boot_partition: %w", ota.Quote(d.c.File), ota.ErrNoBootState)
	}
	c.Active = d.slot(a.Partition)
	if c.Active == ota.NoSlot {
		return a, c, fmt.Errorf("rpi: %s has boot_partition=%d, which is no slot: %w", ota.Quote(d.c.File), a.Partition, ota.ErrBadBootState)
	}
	try := d.slot(a.Tryboot)
	if try == ota.NoSlot || try == c.Active || !a.AB {
		return a, c, nil
	}
	trial := driver.Choice{Active: try, Trial: true, Revert: c.Active, Booted: true}
	state, boot, _ := strings.Cut(a.trial, " ")
	if state == begun {
		return a, trial, nil
	}
	now, err := d.bootID()
	if err != nil {
		return nil, c, err
	}
	under, err := d.under(a.Tryboot)
	if err != nil {
		return nil, c, err
	}
	if under && !(state == pending && boot == now) {
		return a, trial, nil // begun by hand
	}
	if state == pending {
		trial.Booted, trial.Tries = false, 1
		return a, trial, nil
	}
	return a, c, nil // the section alone is what every file may have
}

// under reports whether the firmware has booted a partition because of the flag.
func (d *Driver) under(partition int) (bool, error) {
	flag, err := d.property("tryboot")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || flag == 0 {
		return false, err
	}
	p, err := d.property("partition")
	return err == nil && p == uint32(partition), err
}

func (d *Driver) bootID() (string, error) {
	b, err := d.c.files.ReadFile(d.c.BootID)
	if err != nil {
		return "", fmt.Errorf("rpi: %w", err)
	}
	id := strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")
	return id[:min(len(id), 32)], nil
}

// Read implements [driver.Driver].
func (d *Driver) Read(ctx context.Context) (driver.Choice, error) {
	_, c, err := d.load(ctx)
	return c, err
}

// Write implements [driver.Driver]. It prepares a trial; [Driver.Reset] begins it.
func (d *Driver) Write(ctx context.Context, c driver.Choice) error {
	n := ota.SlotID(len(d.c.Partitions))
	if c.Active < 0 || c.Active >= n || c.Revert >= n || c.Trial && (c.Revert < 0 || c.Revert == c.Active) {
		return fmt.Errorf("rpi: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	}
	if c.Tries < 0 || c.Tries > 1 || c.Trial && c.Booted == (c.Tries > 0) {
		return fmt.Errorf("rpi: %d tries, booted %v: %w", c.Tries, c.Booted, ota.ErrInvalid)
	}
	a, _, err := d.load(ctx)
	if a == nil {
		return err
	}
	next := &Autoboot{Partition: d.c.Partitions[c.Active], AB: true, others: a.others}
	next.Tryboot = next.Partition
	if c.Trial {
		next.Partition = d.c.Partitions[c.Revert]
		next.trial = begun
		if c.Tries > 0 {
			id, err := d.bootID()
			if err != nil {
				return err
			}
			next.trial = pending + " " + id
		}
	}
	return d.write(next)
}

// write replaces autoboot.txt, unless it says a already.
func (d *Driver) write(a *Autoboot) error {
	b, err := a.Bytes()
	if err != nil {
		return err
	}
	if old, err := d.c.files.ReadFile(d.c.File); err == nil && slices.Equal(old, b) {
		return nil
	}
	if err := fsys.Replace(d.c.files, d.c.File, b); err != nil {
		return fmt.Errorf("rpi: %w", err)
	}
	got, err := d.c.files.ReadFile(d.c.File)
	if err == nil && !slices.Equal(got, b) {
		err = ota.ErrVerify
	}
	if err != nil {
		return fmt.Errorf("rpi: reading %s back: %w", ota.Quote(d.c.File), err)
	}
	return nil
}

// Arm returns the argument that the machine must be restarted with now, "" for an
// ordinary restart. If a trial is pending it is written down as begun: from here on
// any restart but that one fails it. Arm is not to be called concurrently with the
// methods of the [driver.Bootloader] that the driver belongs to.
func (d *Driver) Arm(ctx context.Context) (arg string, err error) {
	a, c, err := d.load(ctx)
	if errors.Is(err, ota.ErrNoBootState) {
		return "", nil
	}
	if err != nil || !c.Trial || c.Booted {
		return "", err
	}
	a.trial = begun
	if err := d.write(a); err != nil {
		return "", err
	}
	return RebootArg, nil
}

// Reset restarts the machine, with the argument that begins a trial if one is
// pending; it is for ota.Options.Reset. It syncs the file systems, and does not stop
// programs: where they must be stopped call [Driver.Arm] and hand its argument to
// the init system (systemctl reboot --reboot-argument=…). It returns only if it
// fails, and needs the capability CAP_SYS_BOOT.
func (d *Driver) Reset(ctx context.Context) error {
	arg, err := d.Arm(ctx)
	if err != nil {
		return err
	}
	if err := d.c.reboot(arg); err != nil {
		err = fmt.Errorf("rpi: restart: %w", err)
		if arg == "" {
			return err
		}
		// The trial has not begun after all.
		_, c, lerr := d.load(ctx)
		if lerr == nil {
			c.Booted, c.Tries = false, 1
			lerr = d.Write(ctx, c)
		}
		return errors.Join(err, lerr)
	}
	return nil
}
