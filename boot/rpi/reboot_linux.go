package rpi

import (
	"os"
	"syscall"
	"unsafe"
)

// reboot restarts the machine; reboot(2).
func reboot(arg string) error {
	syscall.Sync()
	if arg == "" {
		return os.NewSyscallError("reboot", syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART))
	}
	p, err := syscall.BytePtrFromString(arg)
	if err != nil {
		return err
	}
	_, _, e := syscall.Syscall6(syscall.SYS_REBOOT, syscall.LINUX_REBOOT_MAGIC1, syscall.LINUX_REBOOT_MAGIC2,
		syscall.LINUX_REBOOT_CMD_RESTART2, uintptr(unsafe.Pointer(p)), 0, 0)
	if e != 0 {
		return os.NewSyscallError("reboot", e)
	}
	return nil
}
