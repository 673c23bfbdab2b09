//go:build linux

package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/grub"
	"github.com/slotota/ota/boot/uboot"
)

// openDriver returns the driver of the boot loader that is named on the kernel
// command line.
func openDriver() (driver.Driver, error) {
	name, err := driver.CmdlineParam("", "ota.loader")
	if err != nil {
		return nil, err
	}
	switch name {
	case "uboot":
		return openUBoot()
	case "grub":
		return openGRUB()
	}
	return nil, fmt.Errorf("no driver for %q", name)
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
