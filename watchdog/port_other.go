//go:build !linux

package watchdog

import "github.com/slotota/ota"

func openPort(string) (port, error) { return nil, ota.ErrUnsupported }
