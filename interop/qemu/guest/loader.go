//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/efi"
	"github.com/slotota/ota/boot/efibootguard"
	"github.com/slotota/ota/boot/grub"
	"github.com/slotota/ota/boot/systemdboot"
	"github.com/slotota/ota/boot/uboot"
	"github.com/slotota/ota/interop/qemu"
)

// loader is a boot loader that the guest knows.
type loader struct {
	open func() (driver.Driver, error)
	// files is the directory of the parts of a slot, with %s for "a" or "b", if
	// they are files and not partitions.
	files string
	// entries says that the one part of a slot is its boot menu entry, a unified
	// kernel image, whose name changes.
	entries bool
	// armed says that the loader starts a watchdog, which nobody can stop.
	armed bool
}

// esp is where the EFI system partition is mounted.
const esp = "/efi"

// loaders by the value of the kernel parameter ota.loader.
var loaders = map[string]loader{
	"uboot":        {open: openUBoot},
	"grub":         {open: openGRUB},
	"efi":          {open: openEFI},
	"systemd-boot": {open: openSystemdBoot, files: esp + "/ota/%s/"},
	"one-shot":     {open: openOneShot, files: esp + "/ota/%s/"},
	"uki":          {open: openSystemdBoot, entries: true},
	"efibootguard": {open: openBootGuard, files: "/config-%s/", armed: true},
}

// openUBoot: the environment has two copies in a partition of its own.
func openUBoot() (driver.Driver, error) {
	dev, err := partition("env")
	if err != nil {
		return nil, err
	}
	config := fmt.Sprintf("%s 0x0 0x4000\n%s 0x10000 0x4000\n", dev, dev)
	if err := os.WriteFile("/run/fw_env.config", []byte(config), 0o644); err != nil {
		return nil, err
	}
	env, err := uboot.Open(&uboot.Config{File: "/run/fw_env.config"})
	if err != nil {
		return nil, err
	}
	return uboot.NewDriver(env, &uboot.DriverConfig{Names: slotNames})
}

// openGRUB: GRUB's files are in a file system of their own.
func openGRUB() (driver.Driver, error) {
	if err := mount("boot", "/boot", "ext4"); err != nil {
		return nil, err
	}
	return grub.New(&grub.Config{Names: slotNames})
}

// openEFI: the firmware starts the kernel in the partition of a slot.
func openEFI() (driver.Driver, error) {
	if err := mountVariables(); err != nil {
		return nil, err
	}
	c := &efi.Config{}
	for _, name := range slotNames {
		dev, err := partition("system-" + strings.ToLower(name))
		if err != nil {
			return nil, err
		}
		b, err := os.ReadFile("/sys/class/block/" + filepath.Base(dev) + "/partition")
		if err != nil {
			return nil, err
		}
		number, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
		if err != nil {
			return nil, err
		}
		disk, err := os.Open("/dev/vda")
		if err != nil {
			return nil, err
		}
		hd, err := efi.Partition(disk, 0, uint32(number))
		disk.Close()
		if err != nil {
			return nil, err
		}
		c.Slots = append(c.Slots, efi.Slot{
			Description: "ota " + name, Partition: hd, File: `\vmlinuz`,
			Cmdline: qemu.EFICmdline,
		})
	}
	return efi.New(c)
}

// openSystemdBoot: all is on the EFI system partition.
func openSystemdBoot() (driver.Driver, error) {
	c, err := systemdBoot()
	if err != nil {
		return nil, err
	}
	return systemdboot.New(c)
}

func openOneShot() (driver.Driver, error) {
	c, err := systemdBoot()
	if err != nil {
		return nil, err
	}
	return systemdboot.NewOneShot(c)
}

func systemdBoot() (*systemdboot.Config, error) {
	if err := mountVariables(); err != nil {
		return nil, err
	}
	if err := mount("esp", esp, "vfat"); err != nil {
		return nil, err
	}
	return &systemdboot.Config{Root: esp, Entries: []string{"ota-a", "ota-b"}}, nil
}

// openBootGuard: each slot has a config partition.
func openBootGuard() (driver.Driver, error) {
	c := &efibootguard.Config{}
	for _, name := range slotNames {
		dir := "config-" + strings.ToLower(name)
		if err := mount(dir, "/"+dir, "vfat"); err != nil {
			return nil, err
		}
		c.Slots = append(c.Slots, efibootguard.Slot{File: "/" + dir + "/BGENV.DAT", Name: name})
	}
	return efibootguard.New(c)
}

func mountVariables() error {
	return unix.Mount("efivarfs", "/sys/firmware/efi/efivars", "efivarfs", 0, "")
}

func mount(part, dir, kind string) error {
	dev, err := partition(part)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dev, dir, kind, 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", part, err)
	}
	return nil
}
