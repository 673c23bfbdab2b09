//go:build !linux

package rpi

import "github.com/slotota/ota"

func reboot(string) error { return ota.ErrUnsupported }
