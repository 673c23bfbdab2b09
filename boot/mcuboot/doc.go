// Package mcuboot reads and verifies MCUboot images, reads and writes the trailers
// by which firmware and loader talk to each other, and drives MCUboot in
// direct-XIP mode.
//
// # Images
//
// [VerifyImage] checks structure, hash and signature (ECDSA P-256 or Ed25519), as
// the loader does. What an image says about itself in its trailing area counts only
// if it is in the protected part, which is signed.
//
// # Swap modes
//
// In these modes firmware always runs from the primary slot: the loader exchanges
// the content of both slots before it starts a trial, and again to go back. A slot
// of this library is a place whose content stays where it was written; its records
// name slots, and say what they hold. Images that move between slots break that, so
// there is no driver for the swap modes. What a program needs to control them by
// itself is here: write the image into the secondary slot, verify it, call
// [Trailer.SetPending], reboot, and call [Trailer.Confirm] on the primary slot;
// [NextSwap] tells what the loader will do. Each of these is decided by one program
// operation.
//
// # Direct-XIP with revert
//
// With MCUBOOT_DIRECT_XIP and MCUBOOT_DIRECT_XIP_REVERT an image runs where it lies,
// and [Driver] fits: slot 0 is the primary one, slot 1 the secondary one. The
// loader starts the image with the higher version (the primary one if they are
// equal) that has the trailer magic; it marks it by copy_done. If it finds
// copy_done without image_ok, the image was started and not confirmed: it erases
// that slot and takes the other one (mcu-tools/mcuboot,
// boot/bootutil/src/loader.c, boot_select_or_erase).
//
// It follows that only an image with a higher version can be tried; that the slot
// of a failed trial is empty afterwards; and that the factory image needs a
// trailer with image_ok, as made by imgtool sign --pad --confirm. Images must be
// installed without a trailer, through [Driver.Image]: then the loader ignores (and
// erases) them until the trial is stored. The magic is written last, as one program
// operation.
//
// Without the revert option the loader always starts the highest version and
// nothing can be on trial; do not use this driver then.
package mcuboot
